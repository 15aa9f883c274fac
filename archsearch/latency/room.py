"""What a model takes at least and what there is for it: both known before a tensor exists, and without torch.

A model that cannot fit is refused for what it is. Tried, it would drive the machine into swapping for minutes and end
by the kernel's hand, which looks like a crash.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from archsearch import cost
from archsearch.architecture import DTYPE_BYTES, ModelSpec
from archsearch.notation import in_bytes, si

COPIES = 4  # of the parameters in a training: themselves, gradients, AdamW's two moments
WITH_STATE = ("prefill_ms", "decode_ms", "peak_memory")


def bench_bytes(model: ModelSpec, objective: str, context: int | None, batch: int) -> int:
    """Bytes that measuring an objective takes at least; activations come on top."""
    weights = cost.weight_bytes(model)
    if objective in WITH_STATE:
        return weights + cost.state_bytes(model, context, batch)
    return COPIES * weights if objective == "train_step_ms" else weights


def train_bytes(model: ModelSpec) -> int:
    """Bytes that a trial's training takes at least, in float32; activations come on top."""
    return COPIES * cost.params(model) * DTYPE_BYTES["float32"]


def too_big(model: ModelSpec, what: str, least: int, room: int) -> str:
    """That `least` bytes for `what` are more than `room`, in a sentence without its full stop."""
    size = f"{si(cost.params(model))} parameters, {model.dtype}"
    return f"{what} ({size}) takes at least {in_bytes(least)} and the device has {in_bytes(room)}"


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this process may still take without swapping; None where nobody tells.

    The least of what the machine has available, what the container (cgroup v1 or v2) leaves, and the process's limit.
    """
    found = list(_left_by_cgroups(proc, cgroups))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    if not found:
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit)
    return min(found, default=None)


def _left_by_cgroups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of every group that this process is in, down from the root: its limit less what it holds and cannot drop."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        limit, used, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        at = root / path.lstrip("/")
        for group in (at, *at.parents):
            if group.is_relative_to(root):
                with contextlib.suppress(OSError, ValueError, KeyError):  # no limit here, or nobody tells
                    stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                    held = int((group / used).read_text()) - int(stat[cache])
                    yield max(0, int((group / limit).read_text()) - held)
