"""What this machine has, found out without torch, whose import takes seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def has_gpu() -> bool:
    """Whether programs here see an NVIDIA GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and shutil.which("nvidia-smi") is not None


def memory(of_gpu: bool = False) -> int | None:
    """Bytes of the largest GPU, or else of this machine as far as its container may use it; None: nobody says."""
    return largest(gpu_memory()) if of_gpu else _main_memory()


def gpu_memory() -> list[int | None]:
    """Bytes of each GPU by its index: None where the driver does not say, [] where there is no driver to ask."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * 2**20 if line.strip().isdigit() else None for line in told.splitlines()]  # told in MiB


def largest(sizes: list[int | None]) -> int | None:
    """Of sizes that are all known; None if there is none or one is not."""
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None


def _main_memory() -> int | None:
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    allowed = _CONTAINER.read_text().strip() if _CONTAINER.exists() else "max"
    return min(whole, int(allowed)) if allowed.isdigit() else whole
