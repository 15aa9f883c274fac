"""Kimi delta attention on the GPU: forward and backward as operators of torch."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.gla.chunk import gradients, intra, padded, read
from archsearch_kernels.gla.kernels.decays import CHUNK
from archsearch_kernels.gla.operands import rows
from archsearch_kernels.kda.kernels import kda_inverse, kda_walk
from archsearch_kernels.launch import Config


def walk(
    v: Tensor,
    reads: Tensor,
    writes: Tensor,
    inverses: Tensor,
    total: Tensor,
    initial: Tensor | None,
    scores: Tensor | None = None,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, H, V], states as chunks find them [B, H, chunks, K, V], and the last in float32.

    Forwards what is written; backwards, with `scores` and `queries`, v is the gradient of the outputs, x that of what
    was read, and the states are the gradients of those that chunks leave.
    """
    (B, T, H, K), V = reads.shape, v.shape[3]
    v, v_row = rows(v)
    x = v.new_empty(B, T, H, V)
    found = v.new_empty(B, H, total.shape[2], K, V)
    final = v.new_empty(B, H, K, V, dtype=torch.float32)
    arguments = {
        "v": v, "reads": reads, "writes": writes, "inverses": inverses, "scores": scores, "queries": queries,
        "total": total, "initial": initial, "x": x, "found": found, "final": final, "T": T, "H": H, "v_row": v_row,
        "K": K, "V": V, "KP": padded(K), "REVERSE": scores is not None,
    }  # fmt: skip

    def programs(config: Config) -> tuple[int, ...]:
        return (triton.cdiv(V, config["BV"]) * B * H,)

    kda_walk.launch(programs, arguments, sizes={"T": T, "BH": B * H})
    return x, found, final


@torch.library.custom_op(
    "archsearch::kda",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, float scale, Tensor? initial_state, Tensor? seq_idx)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def kda_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, ...]:
    """o, the final state, and for the backward: P, Y, q and k since, written k until, total, states and y."""
    scores, overlaps, q_since, k_since, until, total = intra(q, k, g, beta, seq_idx, scale)
    assert overlaps is not None
    assert k_since is not None
    inverses = torch.empty_like(scores)
    kda_inverse.launch(lambda c: (scores.shape[:3].numel(),), {"overlaps": overlaps, "inverses": inverses}, sizes={})
    y, states, final = walk(v, k_since, until, inverses, total, initial_state)
    o = read(scores, y, q_since, states)
    return o, final, scores, inverses, q_since, k_since, until, total, states, y


@kda_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, ...]:
    (B, T, H, K), V = q.shape, v.shape[3]
    n = (T + CHUNK - 1) // CHUNK
    return (
        v.new_empty(B, T, H, V),
        v.new_empty(B, H, K, V, dtype=torch.float32),
        q.new_empty(B, H, n, CHUNK, CHUNK),
        q.new_empty(B, H, n, CHUNK, CHUNK),
        q.new_empty(B, T, H, K),
        q.new_empty(B, T, H, K),
        q.new_empty(B, T, H, K),
        q.new_empty(B, H, n, K, dtype=torch.float32),
        v.new_empty(B, H, n, K, V),
        v.new_empty(B, T, H, V),
    )


@torch.library.custom_op(
    "archsearch::kda_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor beta, Tensor g, float scale, Tensor? seq_idx, Tensor scores, Tensor inverses,"
    " Tensor q_since, Tensor k_since, Tensor until, Tensor total, Tensor states, Tensor y, Tensor d_o, Tensor? d_final)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def kda_backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float,
    seq_idx: Tensor | None,
    scores: Tensor,
    inverses: Tensor,
    q_since: Tensor,
    k_since: Tensor,
    until: Tensor,
    total: Tensor,
    states: Tensor,
    y: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g and of the initial state."""
    dv, d_states, d_initial = walk(d_o, until, k_since, inverses, total, d_final, scores, q_since)
    dq, dk, dg, d_beta = gradients(q, k, y, g, seq_idx, d_o, states, d_states, scale, beta, dv)
    assert d_beta is not None
    return dq, dk, dv, d_beta.to(beta.dtype), dg, d_initial


@kda_backward.register_fake
def _(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (B, _, H, K), y = q.shape, rest[9]
    dq, dk, d_beta, dg = (x.new_empty(x.shape) for x in (q, k, beta, g))
    return dq, dk, y.new_empty(y.shape), d_beta, dg, y.new_empty(B, H, K, y.shape[3], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, beta, g, scale, initial_state, seq_idx = inputs
    ctx.set_materialize_grads(False)  # zeros for what is only saved would cost more than the backward
    ctx.save_for_backward(q, k, beta, g, seq_idx, *output[2:])
    ctx.scale, ctx.has_initial = scale, initial_state is not None


def _backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, beta, g, seq_idx, *saved = ctx.saved_tensors
    if d_o is None:
        d_o = torch.zeros_like(saved[-1])
    if d_final is not None:
        d_final = d_final.contiguous()
    *grads, d_initial = direct(kda_backward, q, k, beta, g, ctx.scale, seq_idx, *saved, d_o, d_final)
    return *grads, None, d_initial if ctx.has_initial else None, None


kda_forward.register_autograd(_backward, setup_context=_save)


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Operands as the public function has checked them; q and k are taken in v's dtype."""
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    if seq_idx is not None:
        seq_idx = seq_idx.contiguous()
    o, final, *_ = direct(kda_forward, q.to(v.dtype), k.to(v.dtype), v, beta, g, scale, initial_state, seq_idx)
    return o, final
