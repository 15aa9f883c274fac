"""Triton kernels for NAME where they can run; elsewhere torch computes, by the same code as without them."""

from __future__ import annotations

import logging
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def find_kernels() -> Any:
    """Kernels by the name of their operation; None where they are not to be had."""
    try:
        from archsearch_kernels.dispatch import kernels_run
        from archsearch_kernels.swiglu import swiglu
    except ImportError:
        return None
    return SimpleNamespace(kernels_run=kernels_run, swiglu=swiglu)


kernels = find_kernels()


def use_kernels(x: Tensor) -> bool:
    """Whether kernels compute for operands like x; says so the first time."""
    if kernels is None or not kernels.kernels_run(x):
        return False
    if not torch.compiler.is_compiling():
        say_once()
    return True


@cache
def say_once() -> None:
    """Which kernels run."""
    logger.warning("NAME runs the Triton kernels of WHOSE (ARCHSEARCH_KERNELS=reference turns them off)")
