"""One token of linear attention with one decay per head: reads and writes the state once, in place if asked to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.eager import direct, direct_update
from archsearch_kernels.launch import Config
from archsearch_kernels.scalar_decay.kernels.step import scalar_decay_token

_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? A_log, Tensor? dt_bias, Tensor? skip"


def scalar_decay_token_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    scale: float,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, V] and the new state, `state` itself if `inplace`; with A_log, operands are those of `ssd_step`."""
    if inplace:
        return direct_update(_step_, state, q, k, v, g, A_log, dt_bias, skip, state, scale), state
    o, new = direct(_step, q, k, v, g, A_log, dt_bias, skip, state, scale)
    return o, new


@torch.library.custom_op(
    "archsearch::scalar_decay_step",
    mutates_args=(),
    schema=f"({_GIVEN}, Tensor state, float scale) -> (Tensor, Tensor)",
)
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    state = state.contiguous()
    new = torch.empty_like(state)
    return _launch(q, k, v, g, A_log, dt_bias, skip, state, new, scale), new


@_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty(v), _empty(state)


@torch.library.custom_op(
    "archsearch::scalar_decay_step_",
    mutates_args=("state",),
    schema=f"({_GIVEN}, Tensor(a!) state, float scale) -> Tensor",
)
def _step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    scale: float,
) -> Tensor:
    if state.is_contiguous():
        return _launch(q, k, v, g, A_log, dt_bias, skip, state, state, scale)
    new = _empty(state)
    o = _launch(q, k, v, g, A_log, dt_bias, skip, state.contiguous(), new, scale)
    state.copy_(new)
    return o


@_step_.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _empty(v)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    new: Tensor,
    scale: float,
) -> Tensor:
    q, k, v, g = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, g))
    A_log, dt_bias, skip = (None if x is None else x.contiguous() for x in (A_log, dt_bias, skip))
    (B, H, V), (G, K) = v.shape, k.shape[1:]
    o = _empty(v)

    def programs(c: Config) -> tuple[int, ...]:
        return (B * H * -(-V // c["BV"]),)

    operands = {
        "q": q, "k": k, "v": v, "g": g, "A_log": A_log, "dt_bias": dt_bias, "skip": skip, "state": state, "new": new,
        "o": o, "H": H, "scale": scale,
    }  # fmt: skip
    strides = {f"{n}_{d}": x.stride(i) for n, x in (("q", q), ("k", k), ("v", v)) for i, d in enumerate("bh")}
    flags = {"R": H // G, "K": K, "V": V, "KP": 1 << (K - 1).bit_length(), "FIXED": g.dim() == 1}
    arguments = {**operands, **strides, "g_b": g.stride(0), **flags}
    scalar_decay_token.launch(programs, arguments, sizes={"BH": B * H})
    return o
