"""One token of gated linear attention on the GPU: one launch, the state read and written once."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from archsearch_kernels.gla.chunk import padded
from archsearch_kernels.gla.kernels.step import gla_step_kernel
from archsearch_kernels.gla.operands import rows


def _launch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, new_state: Tensor, scale: float) -> Tensor:
    (B, H, K), V = q.shape, v.shape[2]
    (q, q_row), (k, k_row), (v, v_row), (g, g_row) = rows(q), rows(k), rows(v), rows(g)
    o = v.new_empty(B, H, V)
    arguments = {
        "q": q, "k": k, "v": v, "g": g, "state": state, "new_state": new_state, "o": o, "scale": scale, "H": H,
        "q_row": q_row, "k_row": k_row, "v_row": v_row, "g_row": g_row, "K": K, "V": V, "KP": padded(K),
    }  # fmt: skip
    gla_step_kernel.launch(lambda c: (triton.cdiv(V, c["BV"]) * B * H,), arguments, sizes={"BH": B * H})
    return o


@torch.library.custom_op(
    "archsearch::gla_step",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor state, float scale) -> (Tensor, Tensor)",
)
def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output and the new state."""
    new_state = state.new_empty(state.shape)
    return _launch(q, k, v, g, state.contiguous(), new_state, scale), new_state


@step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op(
    "archsearch::gla_step_inplace",
    mutates_args=("state",),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) state, float scale) -> Tensor",
)
def step_inplace(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> Tensor:
    """The output; the state is written over."""
    return _launch(q, k, v, g, state, state, scale)


@step_inplace.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)
