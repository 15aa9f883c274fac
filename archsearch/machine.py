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
    return _gpu_memory() if of_gpu else _main_memory()


def _gpu_memory() -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return max(int(line) for line in told.split()) * 2**20  # told in MiB
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _main_memory() -> int | None:
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    allowed = _CONTAINER.read_text().strip() if _CONTAINER.exists() else "max"
    return min(whole, int(allowed)) if allowed.isdigit() else whole
