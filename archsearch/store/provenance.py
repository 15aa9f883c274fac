"""Provenance of a run: versions, machine, git. Imports none of the packages it names."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from archsearch.store.record import now

PACKAGES = ("archsearch", "torch", "triton", "optuna", "numpy", "networkx", "pydantic")


def environment(
    *, gpu: str | None = None, corpus_sha256: str | None = None, repository: str | Path = "."
) -> dict[str, Any]:
    """Where a run took place, as plain data: versions, machine, git. Imports none of the packages it names.

    gpu: what a worker that holds the device says of it; else nvidia-smi is asked, where there is one.
    """
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "when": now(),
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": cores},
        "gpu": gpu or _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "git": _git(Path(repository)),
        "corpus_sha256": corpus_sha256,
    }


def cpu_model() -> str:
    """The processor as the system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(repository: Path) -> dict[str, Any] | None:
    commit = _output("git", "-C", str(repository), "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "-C", str(repository), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": changed is not None}


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there, fails, hangs or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
