"""Kimi delta attention on the GPU: forward and backward as operators of torch."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.gla.chunk import gradients, intra, padded, read, spans
from archsearch_kernels.gla.kernels import CHUNK
from archsearch_kernels.gla.operands import rows
from archsearch_kernels.kda.kernels import kda_gradients, kda_inverse, kda_solve, kda_walk
from archsearch_kernels.launch import Config


def solve(
    inverses: Tensor, scores: Tensor | None, v: Tensor, keys: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Y v and -Y keys, or Y^T P^T v and Y^T keys, of every chunk: [B, T, H, V] and [B, T, H, K]."""
    (B, T, H, K), V, n = keys.shape, v.shape[3], inverses.shape[2]
    v, v_row = rows(v)
    u, w = v.new_empty(B, T, H, V), v.new_empty(B, T, H, K)
    arguments = {
        "inverses": inverses, "scores": scores, "v": v, "keys": keys, "u": u, "w": w, "T": T, "H": H, "v_row": v_row,
        "K": K, "V": V, "REVERSE": reverse,
    }  # fmt: skip

    def programs(config: Config) -> tuple[int, ...]:
        return ((triton.cdiv(V, config["BD"]) + triton.cdiv(K, config["BD"])) * n * B * H,)

    kda_solve.launch(programs, arguments, sizes={"T": T, "BH": B * H})
    return u, w


def walk(
    u: Tensor,
    w: Tensor,
    keys: Tensor,
    total: Tensor,
    initial: Tensor | None,
    queries: Tensor | None = None,
    d_o: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x = u + w S [B, T, H, V], states as found [B, H, chunks, K, V], the last; backwards with `queries` and `d_o`."""
    (B, T, H, K), V = keys.shape, u.shape[3]
    x = u.new_empty(B, T, H, V)
    found = u.new_empty(B, H, total.shape[2], K, V)
    final = u.new_empty(B, H, K, V, dtype=torch.float32)
    do, do_row = (None, 0) if d_o is None else rows(d_o)
    arguments = {
        "u": u, "w": w, "keys": keys, "total": total, "initial": initial, "x": x, "found": found, "final": final,
        "queries": queries, "do": do, "T": T, "H": H, "do_row": do_row, "K": K, "V": V, "KP": padded(K),
        "REVERSE": queries is not None,
    }  # fmt: skip
    kda_walk.launch(lambda c: (triton.cdiv(V, c["BV"]) * B * H,), arguments, sizes={"T": T, "BH": B * H})
    return x, found, final


@torch.library.custom_op(
    "archsearch::kda",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, float scale, Tensor? initial_state, Tensor? seq_idx)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    """o, the final state, and for the backward: m, P, Y, q since, m until, k since, total, states and y."""
    written = (k * beta[..., None]).to(k.dtype)
    scores, q_since, until, total = intra(q, written, g, seq_idx, scale)
    assert until is not None
    assert total is not None
    overlaps, k_since, _, _ = intra(k, written, g, seq_idx, 1.0, strict=True)
    inverses = scores.new_empty(scores.shape)
    kda_inverse.launch(lambda c: (scores.shape[:3].numel(),), {"overlaps": overlaps, "inverses": inverses}, sizes={})
    u, w = solve(inverses, None, v, k_since)
    y, states, final = walk(u, w, until, total, initial_state)
    o = read(scores, y, q_since, states)
    return o, final, written, scores, inverses, q_since, until, k_since, total, states, y


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
        k.new_empty(B, T, H, K),
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
    schema="(Tensor q, Tensor k, Tensor beta, Tensor g, float scale, Tensor? seq_idx, Tensor written, Tensor scores,"
    " Tensor inverses, Tensor q_since, Tensor until, Tensor k_since, Tensor total, Tensor states, Tensor y, Tensor d_o,"
    " Tensor? d_final) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def kda_backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float,
    seq_idx: Tensor | None,
    written: Tensor,
    scores: Tensor,
    inverses: Tensor,
    q_since: Tensor,
    until: Tensor,
    k_since: Tensor,
    total: Tensor,
    states: Tensor,
    y: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g and of the initial state."""
    (B, T, H, K), V, n = q.shape, y.shape[3], scores.shape[2]
    r, w = solve(inverses, scores, d_o, until, reverse=True)
    dv, d_states, d_initial = walk(r, w, k_since, total, d_final, q_since, d_o)
    dq, d_written, dg_before = gradients(q, written, y, g, seq_idx, d_o, states, d_states, scale, torch.float32)

    (k, k_row), (g, g_row), (beta, beta_row) = rows(k), rows(g), _heads(beta)
    dk, dg = k.new_empty(B, T, H, K), g.new_empty(B, T, H, K)
    BK = 64 if k.element_size() == 2 else 32
    tiles = triton.cdiv(K, BK)
    d_beta = k.new_empty(tiles, B, T, H, dtype=torch.float32)
    arguments = {
        "q": k, "k": written, "v": y, "g": g, "seq_idx": seq_idx, "spans": spans(k.device), "do": dv, "states": states,
        "beta": beta, "dk": dk, "dk_before": d_written, "dg": dg, "dg_before": dg_before, "d_beta": d_beta, "T": T,
        "H": H, "q_row": k_row, "k_row": H * K, "g_row": g_row, "beta_row": beta_row, "K": K, "V": V, "BK": BK,
    }  # fmt: skip
    kda_gradients.launch(lambda c: (tiles * n * B * H,), arguments, sizes={"T": T, "BH": B * H})
    return dq, dk, dv, d_beta.sum(0).to(beta.dtype), dg, d_initial


@kda_backward.register_fake
def _(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (B, _, H, K), y = q.shape, rest[10]
    dq, dk, d_beta, dg = (x.new_empty(x.shape) for x in (q, k, beta, g))
    return dq, dk, y.new_empty(y.shape), d_beta, dg, y.new_empty(B, H, K, y.shape[3], dtype=torch.float32)


def _heads(beta: Tensor) -> tuple[Tensor, int]:
    """beta [B, T, H] such that heads lie side by side, and the stride of a row."""
    if beta.stride(2) == 1 and beta.stride(0) == beta.shape[1] * beta.stride(1):
        return beta, beta.stride(1)
    return beta.contiguous(), beta.shape[2]


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
