"""One token of Kimi delta attention on the GPU: one launch, the state read and written once."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from archsearch_kernels.gla.chunk import padded
from archsearch_kernels.gla.operands import rows
from archsearch_kernels.kda.kernels import kda_step_kernel


def _launch(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, new_state: Tensor, scale: float
) -> Tensor:
    (B, H, K), V = q.shape, v.shape[2]
    (q, q_row), (k, k_row), (v, v_row), (g, g_row) = rows(q), rows(k), rows(v), rows(g)
    if beta.stride(1) != 1:
        beta = beta.contiguous()
    o = v.new_empty(B, H, V)
    arguments = {
        "q": q, "k": k, "v": v, "beta": beta, "g": g, "state": state, "new_state": new_state, "o": o, "scale": scale,
        "H": H, "q_row": q_row, "k_row": k_row, "v_row": v_row, "beta_row": beta.stride(0), "g_row": g_row, "K": K,
        "V": V, "KP": padded(K),
    }  # fmt: skip
    kda_step_kernel.launch(lambda c: (triton.cdiv(V, c["BV"]) * B * H,), arguments, sizes={"BH": B * H})
    return o


@torch.library.custom_op(
    "archsearch::kda_step",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor state, float scale) -> (Tensor, Tensor)",
)
def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and the new state."""
    new_state = state.new_empty(state.shape)
    return _launch(q, k, v, beta, g, state.contiguous(), new_state, scale), new_state


@step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op(
    "archsearch::kda_step_inplace",
    mutates_args=("state",),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor(a!) state, float scale) -> Tensor",
)
def step_inplace(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, scale: float) -> Tensor:
    """The output; the state is written over."""
    return _launch(q, k, v, beta, g, state, state, scale)


@step_inplace.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)
