"""The delta rule for one token on the GPU: one kernel that reads the state once and writes it once."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.delta_rule.kernels.step import delta_rule_token
from archsearch_kernels.eager import direct, direct_update

EPS = 1e-6  # of `l2_norm`
_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? A_log, Tensor? dt_bias"
_OPTIONS = "float scale, float max_beta, bool raw"


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Checked arguments; shapes as in `archsearch_kernels.delta_rule.delta_rule_step`."""
    return _called(inplace, state, (q, k, v, beta, g, None, None), (scale, 1.0, False))


def projected_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    max_beta: float,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Checked arguments; shapes as in `archsearch_kernels.delta_rule.projected_delta_rule_step`."""
    return _called(inplace, state, (q, k, v, beta, decay, A_log, dt_bias), (k.shape[-1] ** -0.5, max_beta, True))


def _called(
    inplace: bool, state: Tensor, given: tuple[Tensor | None, ...], options: tuple[float, float, bool]
) -> tuple[Tensor, Tensor]:
    if inplace:
        return direct_update(_update, state, *given, state, *options), state
    o, new = direct(_step, *given, state, *options)
    return o, new


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    new: Tensor,
    scale: float,
    max_beta: float,
    raw: bool,
) -> Tensor:
    """o [B, H, V]; the new state goes to `new`, laid out as `state`."""
    (B, H, V), (G, K) = v.shape, k.shape[1:]
    q, k, v, beta = (_rows(x) for x in (q, k, v, beta))
    g = None if g is None else _rows(g)
    A_log, dt_bias = (None if x is None else x.contiguous() for x in (A_log, dt_bias))
    o = v.new_empty(B, H, V)
    arguments = {
        "q": q, "k": k, "v": v, "beta": beta, "g": g, "A_log": A_log, "dt_bias": dt_bias, "state": state, "o": o,
        "new": new, "H": H, "RATIO": H // G, "scale": scale, "max_beta": max_beta, "eps": EPS,
        "q_b": q.stride(0), "q_h": q.stride(1), "k_b": k.stride(0), "k_h": k.stride(1),
        "v_b": v.stride(0), "v_h": v.stride(1), "beta_b": beta.stride(0), "g_b": 0 if g is None else g.stride(0),
        "state_b": state.stride(0), "state_h": state.stride(1),
        "RAW": raw, "K": K, "V": V, "KP": triton.next_power_of_2(K),
    }  # fmt: skip
    delta_rule_token.launch(lambda c: (B * H * triton.cdiv(V, c["BV"]),), arguments, sizes={"BH": B * H})
    return o


def _rows(x: Tensor) -> Tensor:
    """x, copied only if what it holds last are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op(
    "archsearch::delta_rule_step",
    mutates_args=(),
    schema=f"({_GIVEN}, Tensor state, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    scale: float,
    max_beta: float,
    raw: bool,
) -> tuple[Tensor, Tensor]:
    state = state.contiguous()
    new = torch.empty_like(state)
    return _launch(q, k, v, beta, g, A_log, dt_bias, state, new, scale, max_beta, raw), new


@_step.register_fake
def _fake_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    scale: float,
    max_beta: float,
    raw: bool,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op(
    "archsearch::delta_rule_update",
    mutates_args=("state",),
    schema=f"({_GIVEN}, Tensor(a!) state, {_OPTIONS}) -> Tensor",
)
def _update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    scale: float,
    max_beta: float,
    raw: bool,
) -> Tensor:
    return _launch(q, k, v, beta, g, A_log, dt_bias, state, state, scale, max_beta, raw)


@_update.register_fake
def _fake_update(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)
