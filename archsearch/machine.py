"""What this machine has and what of it is free, found out without torch, whose import takes seconds."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # limit, use, what of it can go
V2_FILES = ("memory.max", "memory.current", "inactive_file")


def has_gpu() -> bool:
    """Whether programs here see an NVIDIA GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and shutil.which("nvidia-smi") is not None


def memory(of_gpu: bool = False) -> int | None:
    """Bytes of the largest GPU, or else of this machine as far as its container may use it; None: nobody says."""
    return largest(gpu_memory()) if of_gpu else main_memory()


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


def main_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that this machine has, or its container (cgroup v1 or v2) if that may use less; None where nobody tells."""
    whole = _installed()
    return None if whole is None else min([whole, *_limits(proc, cgroups)])


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes of memory that this process may still take without swapping; None where nobody tells.

    The least of what the machine has available, what the container (cgroup v1 or v2) leaves, and the process's limit.
    """
    found = list(_left(proc, cgroups))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    if not found and (whole := _installed()) is not None:
        found.append(whole)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit)
    return min(found, default=None)


def _installed() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each group may take that has a limit."""
    for group, (limit, _, _) in _groups(proc, cgroups):
        with contextlib.suppress(OSError, ValueError):  # no limit here, or nobody tells
            yield int((group / limit).read_text())


def _left(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of each group that has a limit: that less what it holds and cannot drop."""
    for group, (limit, used, cache) in _groups(proc, cgroups):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no limit here, or nobody tells
            stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
            held = int((group / used).read_text()) - int(stat[cache])
            yield max(0, int((group / limit).read_text()) - held)


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Every control group that this process is in, and those above it, with the names of its files."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (cgroups / "memory", V1_FILES) if controllers else (cgroups, V2_FILES)
        at = root / path.lstrip("/")
        yield from ((group, files) for group in (at, *at.parents) if group.is_relative_to(root))
