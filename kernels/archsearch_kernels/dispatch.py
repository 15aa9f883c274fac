"""Which implementation runs: the Triton kernel where it can, else the reference.

`ARCHSEARCH_KERNELS=auto|triton|reference` sets it for a process, `using("reference")` for a stretch of code, and every
operation takes `implementation=`. `auto` runs the kernel on CUDA tensors and the reference elsewhere; a shape that a
kernel does not take falls to the reference with the reason logged once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from archsearch_kernels.assembler import prefer_a_sound_one

log = logging.getLogger("archsearch_kernels")
F = TypeVar("F", bound=Callable[..., Any])
CHOICES = ("auto", "triton", "reference")
MIN_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies

_chosen: ContextVar[str | None] = ContextVar("archsearch_kernels", default=None)


def constant_when_traced(function: F) -> F:
    """As `torch.compiler.assume_constant_result`, which imports torch._dynamo: seconds where nothing is compiled."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Inside, every operation runs as `auto`, `triton` or `reference` unless its own argument says otherwise."""
    token = _chosen.set(_checked(implementation, "using()"))
    try:
        yield
    finally:
        _chosen.reset(token)


def runs_kernel(op: str, tensor: Tensor, unsupported: str | None = None, implementation: str | None = None) -> bool:
    """Whether `op` runs its Triton kernel for operands like `tensor`.

    unsupported: why the kernel does not take these operands, or None. implementation: the caller's own choice.
    Raises ValueError for an unknown choice, and where `triton` is asked for and cannot be had.
    """
    choice = asked(implementation)
    if choice == "reference":
        return False
    obstacle = unsupported or _obstacle(tensor.device.type, tensor.device.index)
    if obstacle is None:
        return True
    if choice == "triton":
        raise ValueError(f"{op}: the Triton kernel was asked for, but {obstacle}")
    if tensor.device.type == "cuda" and not torch.compiler.is_compiling():
        _say_once(op, obstacle)
    return False


def kernels_run(tensor: Tensor) -> bool:
    """Whether kernels run for operands like `tensor`: asked by code that has a torch form of its own (exported models).

    Raises ValueError where `triton` is asked for and cannot be had.
    """
    choice = asked()
    if choice == "reference":
        return False
    obstacle = _obstacle(tensor.device.type, tensor.device.index)
    if obstacle is not None and choice == "triton":
        raise ValueError(f"the Triton kernels were asked for, but {obstacle}")
    return obstacle is None


def asked(implementation: str | None = None) -> str:
    """What the caller, `using` or the environment wants. torch.compile asks when it traces, and keeps the answer."""
    return _checked(implementation, "implementation") if implementation else _wanted()


@constant_when_traced
def _wanted() -> str:
    return _chosen.get() or _environment()


@constant_when_traced
def _obstacle(device: str, index: int | None) -> str | None:
    return _missing(device, index)


def interpreted() -> bool:
    """Whether Triton runs in its interpreter: on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing(device: str, index: int | None) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'archsearch[triton]')"
    if interpreted():
        return None
    if device != "cuda":
        return f"the tensors are on {device}"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    prefer_a_sound_one(capability)
    return None


@cache
def _say_once(op: str, reason: str) -> None:
    log.warning("%s runs its reference: %s", op, reason)


def _environment() -> str:
    return _checked(os.environ.get("ARCHSEARCH_KERNELS", "auto"), "ARCHSEARCH_KERNELS")


def _checked(choice: str, what: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{what} is '{choice}'; expected one of {', '.join(CHOICES)}")
    return choice
