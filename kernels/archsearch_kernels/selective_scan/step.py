"""One token of the selective scan on the GPU: one launch, the state read and written once."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from archsearch_kernels.selective_scan.kernels import selective_scan_token
from archsearch_kernels.selective_scan.scan import programs, rows, strides

TOKEN_CHANNELS = 128


def _launch(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, new: Tensor) -> Tensor:
    x, dt, b, c = rows(x), rows(dt), rows(b), rows(c)
    (B, D), N = x.shape, a.shape[1]
    y = torch.empty((B, D), dtype=x.dtype, device=x.device)
    arguments = {
        "x": x, "dt": dt, "a": a.contiguous(), "b": b, "c": c, "state": state, "new": new, "y": y, "D": D,
        **strides(x=x, dt=dt, b=b, c=c), "N": N, "NP": triton.next_power_of_2(N), "BD": TOKEN_CHANNELS,
    }  # fmt: skip
    selective_scan_token.launch(programs(B, D, TOKEN_CHANNELS), arguments, sizes={"BD": B * D})
    return y


@torch.library.custom_op(
    "archsearch::selective_scan_step",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor state) -> (Tensor, Tensor)",
)
def step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the new state."""
    new = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    return _launch(x, dt, a, b, c, state.contiguous(), new), new


@step.register_fake
def _(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


@torch.library.custom_op(
    "archsearch::selective_scan_step_inplace",
    mutates_args=("state",),
    schema="(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor(a!) state) -> Tensor",
)
def step_inplace(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """The output; the state is written over."""
    return _launch(x, dt, a, b, c, state, state)


@step_inplace.register_fake
def _(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    return x.new_empty(x.shape)
