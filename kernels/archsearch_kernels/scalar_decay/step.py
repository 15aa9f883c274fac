"""One token of linear attention with one decay per head: reads and writes the state once, in place if asked to."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels.launch import Config
from archsearch_kernels.scalar_decay.kernels.step import scalar_decay_token


def scalar_decay_token_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, H, V] and the new state, which is `state` itself if `inplace`; shapes as in the reference."""
    if inplace:
        return torch.ops.archsearch.scalar_decay_step_(q, k, v, g, state, scale), state
    o, new = torch.ops.archsearch.scalar_decay_step(q, k, v, g, state, scale)
    return o, new


@torch.library.custom_op(
    "archsearch::scalar_decay_step",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor state, float scale) -> (Tensor, Tensor)",
)
def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    state = state.contiguous()
    new = torch.empty_like(state)
    return _launch(q, k, v, g, state, new, scale), new


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty(v), _empty(state)


@torch.library.custom_op(
    "archsearch::scalar_decay_step_",
    mutates_args=("state",),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) state, float scale) -> Tensor",
)
def _step_(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> Tensor:
    if state.is_contiguous():
        return _launch(q, k, v, g, state, state, scale)
    new = _empty(state)
    o = _launch(q, k, v, g, state.contiguous(), new, scale)
    state.copy_(new)
    return o


@_step_.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> Tensor:
    return _empty(v)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, new: Tensor, scale: float) -> Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, H, V), (G, K) = v.shape, k.shape[1:]
    o = _empty(v)

    def programs(c: Config) -> tuple[int, ...]:
        return (B * H * -(-V // c["BV"]),)

    operands = {"q": q, "k": k, "v": v, "g": g.contiguous(), "state": state, "new": new, "o": o, "H": H, "scale": scale}
    strides = {f"{n}_{d}": x.stride(i) for n, x in (("q", q), ("k", k), ("v", v)) for i, d in enumerate("bh")}
    flags = {"R": H // G, "K": K, "V": V, "KP": 1 << (K - 1).bit_length(), "FIXED": g.dim() == 1}
    scalar_decay_token.launch(programs, {**operands, **strides, **flags}, sizes={"BH": B * H})
    return o
