"""What the kernel tests of gla and kda share: one log decay per key feature and token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernel_checks import DEVICE, assert_same, outputs_and_gradients, randn
from torch import Tensor

from archsearch_kernels.launch import forcing, recording

GATES = ("-50", "-50 or none", "to -20", "one feature -9")


def numbered(T: int, *starts: int, B: int = 1) -> Tensor:
    """Documents that begin at `starts`, numbered with gaps."""
    at = torch.arange(T)[:, None]
    return (3 * (at >= torch.tensor(starts)).sum(1)).expand(B, T).contiguous().to(DEVICE)


def strong(kind: str, g: Tensor) -> Tensor:
    """Decays of one of the GATES in place of g [B, T, H, K]."""
    if kind == "-50":
        return torch.full_like(g, -50.0)
    if kind == "-50 or none":
        return torch.where(g < -0.2, -50.0, -1e-6)
    if kind == "to -20":
        return -20 * randn(*g.shape, seed=4).abs()
    return torch.where(torch.arange(g.shape[-1], device=g.device) == 3, -9.0, g)


def assert_exact(run: Callable[..., Any], truth: Callable[..., Any], given: dict[str, Any]) -> None:
    """Errors relative to the largest value; gradients of decays that forget all may all be 0."""
    got = outputs_and_gradients(run, given)
    expected = outputs_and_gradients(truth, {n: x.double() for n, x in given.items()})
    limit = 1e-5 if DEVICE == "cpu" else 5e-3
    for name, x in expected.items():
        assert (got[name].double() - x).abs().max() <= limit * x.abs().max().clamp(min=1e-6), name


def assert_every_configuration_is_right(
    run: Callable[..., Any], reference: Callable[..., Any], given: dict[str, Any]
) -> None:
    """Each configuration of each kernel of a run, forced, gives outputs and gradients of the reference."""
    with recording() as launches:
        outputs_and_gradients(run, given)
    for launch in {x.kernel.name: x for x in launches}.values():
        for config in launch.kernel.configs(launch.arguments):
            with forcing(launch.kernel.name, config):
                assert_same(run, reference, given)
