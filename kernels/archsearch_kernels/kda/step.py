"""One token of Kimi delta attention on the GPU: one launch, the state read and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.eager import direct, direct_update
from archsearch_kernels.gla.chunk import padded
from archsearch_kernels.gla.operands import rows
from archsearch_kernels.kda.kernels import kda_step_kernel

EPS = 1e-6  # of `l2_norm`
_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor? A_log, Tensor? dt_bias"


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    scale: float,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Checked arguments; with A_log and dt_bias those of `projected_kda_step`, without them those of `kda_step`."""
    if inplace:
        return direct_update(_update, state, q, k, v, beta, g, A_log, dt_bias, state, scale), state
    o, new = direct(_step, q, k, v, beta, g, A_log, dt_bias, state, scale)
    return o, new


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    new_state: Tensor,
    scale: float,
) -> Tensor:
    (B, H, K), V = q.shape, v.shape[2]
    (q, q_row), (k, k_row), (v, v_row), (g, g_row) = rows(q), rows(k), rows(v), rows(g)
    A_log, dt_bias = (None if x is None else x.contiguous() for x in (A_log, dt_bias))
    if beta.stride(1) != 1:
        beta = beta.contiguous()
    o = v.new_empty(B, H, V)
    arguments = {
        "q": q, "k": k, "v": v, "beta": beta, "g": g, "A_log": A_log, "dt_bias": dt_bias, "state": state,
        "new_state": new_state, "o": o, "scale": scale, "eps": EPS, "H": H, "q_row": q_row, "k_row": k_row,
        "v_row": v_row, "beta_row": beta.stride(0), "g_row": g_row, "RAW": A_log is not None, "K": K, "V": V,
        "KP": padded(K),
    }  # fmt: skip
    kda_step_kernel.launch(lambda c: (triton.cdiv(V, c["BV"]) * B * H,), arguments, sizes={"BH": B * H})
    return o


@torch.library.custom_op(
    "archsearch::kda_step",
    mutates_args=(),
    schema=f"({_GIVEN}, Tensor state, float scale) -> (Tensor, Tensor)",
)
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    new_state = state.new_empty(state.shape)
    return _launch(q, k, v, beta, g, A_log, dt_bias, state.contiguous(), new_state, scale), new_state


@_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op(
    "archsearch::kda_step_inplace",
    mutates_args=("state",),
    schema=f"({_GIVEN}, Tensor(a!) state, float scale) -> Tensor",
)
def _update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    scale: float,
) -> Tensor:
    return _launch(q, k, v, beta, g, A_log, dt_bias, state, state, scale)


@_update.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)
