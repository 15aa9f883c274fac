"""Gated linear attention on the GPU: forward and backward as operators of torch, three and four launches."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.gla.kernels.backward import gla_gradients, gla_score_gradients
from archsearch_kernels.gla.kernels.decays import CHUNK
from archsearch_kernels.gla.kernels.forward import gla_intra, gla_outputs, gla_states
from archsearch_kernels.gla.operands import heads, rows
from archsearch_kernels.lasting import lasting

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@cache
def spans(device: torch.device) -> Tensor:
    """Which tokens [8, C, C] lie between: each token and the middle of its block, for blocks of 2 to 64 tokens; it and
    the end of the chunk; the chunk's start and it. Copied from the host once, so a first call cannot be captured."""
    i, j = torch.arange(CHUNK)[:, None], torch.arange(CHUNK)
    between = []
    for level in range(CHUNK.bit_length()):  # at last one block of twice the chunk, of which it is the left half
        middle = ((i >> level) | 1) << level
        between.append((j >= torch.minimum(middle, i + 1)) & (j < torch.maximum(middle, i + 1)))
    return lasting(device, lambda: torch.stack([*between, j <= i]).to(torch.bfloat16).to(device))


def padded(D: int) -> int:
    """Features of a tile that holds D."""
    return max(16, int(triton.next_power_of_2(D)))


def walk(
    keys: Tensor, values: Tensor, total: Tensor, initial: Tensor | None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The state as each chunk finds it [B, H, chunks, K, V] and as the last leaves it [B, H, K, V] in float32."""
    (B, T, H, K), V = keys.shape, values.shape[3]
    values, value_row = rows(values)
    found = values.new_empty(B, H, total.shape[2], K, V)
    final = values.new_empty(B, H, K, V, dtype=torch.float32)
    arguments = {
        "keys": keys, "values": values, "total": total, "initial": initial, "found": found, "final": final,
        "T": T, "H": H, "value_row": value_row, "K": K, "V": V, "KP": padded(K), "REVERSE": reverse,
    }  # fmt: skip
    gla_states.launch(lambda c: (triton.cdiv(V, c["BV"]) * B * H,), arguments, sizes={"T": T, "BH": B * H})
    return found, final


def read(scores: Tensor, x: Tensor, keys: Tensor, states: Tensor, transposed: bool = False) -> Tensor:
    """scores x + keys state in every chunk, [B, T, H, V] in x's dtype; with the scores transposed if asked."""
    (B, T, H, K), V = keys.shape, x.shape[3]
    x, x_row = rows(x)
    out = x.new_empty(B, T, H, V)
    n = scores.shape[2]
    arguments = {
        "scores": scores, "x": x, "keys": keys, "states": states, "out": out, "T": T, "H": H, "x_row": x_row,
        "K": K, "V": V, "TRANSPOSED": transposed,
    }  # fmt: skip
    gla_outputs.launch(lambda c: (triton.cdiv(V, c["BV"]) * n * B * H,), arguments, sizes={"T": T, "BH": B * H})
    return out


class Intra(NamedTuple):
    """What a chunk makes of its own tokens. The delta rule's alone: overlaps and k_since."""

    scores: Tensor  # [B, H, chunks, C, C]
    overlaps: Tensor | None  # the same of k and earlier k, in float32
    q_since: Tensor  # [B, T, H, K], decayed from the chunk's start
    k_since: Tensor | None
    k_until: Tensor  # what is written, decayed to the chunk's end
    total: Tensor  # decays of chunks [B, H, chunks, K]


def intra(q: Tensor, k: Tensor, g: Tensor, beta: Tensor | None, seq_idx: Tensor | None, scale: float) -> Intra:
    """Of every chunk; with `beta` [B, T, H] tokens write beta k and are read with k too."""
    B, T, H, K = q.shape
    (q, q_row), (k, k_row), (g, g_row), (beta, beta_row) = rows(q), rows(k), rows(g), heads(beta)
    n = triton.cdiv(T, CHUNK)
    found = Intra(
        scores=q.new_empty(B, H, n, CHUNK, CHUNK),
        overlaps=None if beta is None else q.new_empty(B, H, n, CHUNK, CHUNK, dtype=torch.float32),
        q_since=q.new_empty(B, T, H, K),
        k_since=None if beta is None else q.new_empty(B, T, H, K),
        k_until=q.new_empty(B, T, H, K),
        total=q.new_empty(B, H, n, K, dtype=torch.float32),
    )
    arguments = {
        "q": q, "k": k, "g": g, "beta": beta, "seq_idx": seq_idx, "spans": spans(q.device), **found._asdict(),
        "scale": scale, "T": T, "H": H, "q_row": q_row, "k_row": k_row, "g_row": g_row, "beta_row": beta_row, "K": K,
    }  # fmt: skip
    gla_intra.launch(lambda c: (n * B * H,), arguments, sizes={"T": T, "BH": B * H})
    return found


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    seq_idx: Tensor | None,
    d_o: Tensor,
    states: Tensor,
    d_states: Tensor,
    scale: float,
    beta: Tensor | None = None,
    d_read: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, g and beta; in the delta rule v is what is written, `d_read` the gradient of what k reads."""
    (B, T, H, K), V, n = q.shape, v.shape[3], states.shape[2]
    (q, q_row), (k, k_row), (v, v_row), (g, g_row), (d_o, do_row) = rows(q), rows(k), rows(v), rows(g), rows(d_o)
    beta, beta_row = heads(beta)
    sizes = {"T": T, "BH": B * H}
    d_scores = q.new_empty(B, H, n, CHUNK, CHUNK)
    d_overlaps = None if d_read is None else torch.empty_like(d_scores)
    arguments = {
        "v": v, "do": d_o, "dr": d_read, "seq_idx": seq_idx, "d_scores": d_scores, "d_overlaps": d_overlaps,
        "scale": scale, "T": T, "H": H, "v_row": v_row, "do_row": do_row, "V": V,
    }  # fmt: skip
    gla_score_gradients.launch(lambda c: (n * B * H,), arguments, sizes=sizes)

    dq, dk, dg = q.new_empty(B, T, H, K), k.new_empty(B, T, H, K), g.new_empty(B, T, H, K)
    BK = 32  # not configuration: the shape of d_beta follows it
    tiles = triton.cdiv(K, BK)
    d_beta = None if beta is None else q.new_empty(tiles, B, T, H, dtype=torch.float32)
    arguments = {
        "q": q, "k": k, "v": v, "g": g, "beta": beta, "seq_idx": seq_idx, "spans": spans(q.device), "do": d_o,
        "dr": d_read, "d_scores": d_scores, "d_overlaps": d_overlaps, "states": states, "state_grads": d_states,
        "dq": dq, "dk": dk, "dg": dg, "d_beta": d_beta, "scale": scale, "T": T, "H": H, "q_row": q_row, "k_row": k_row,
        "v_row": v_row, "g_row": g_row, "do_row": do_row, "beta_row": beta_row, "K": K, "V": V, "BK": BK,
    }  # fmt: skip
    gla_gradients.launch(lambda c: (tiles * n * B * H,), arguments, sizes=sizes)
    return dq, dk, dg, None if d_beta is None else d_beta.sum(0)


@torch.library.custom_op(
    "archsearch::gla",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor? initial_state, Tensor? seq_idx)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gla_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, *Saved]:
    """o, the final state, and for the backward: scores, decayed q and k, decays of chunks, states."""
    scores, _, q_since, _, k_until, total = intra(q, k, g, None, seq_idx, scale)
    states, final = walk(k_until, v, total, initial_state)
    return read(scores, v, q_since, states), final, scores, q_since, k_until, total, states


@gla_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, *Saved]:
    (B, T, H, K), V = q.shape, v.shape[3]
    n = (T + CHUNK - 1) // CHUNK
    rows_of_keys = q.new_empty(B, T, H, K), q.new_empty(B, T, H, K)
    return (
        v.new_empty(B, T, H, V),
        v.new_empty(B, H, K, V, dtype=torch.float32),
        q.new_empty(B, H, n, CHUNK, CHUNK),
        *rows_of_keys,
        q.new_empty(B, H, n, K, dtype=torch.float32),
        v.new_empty(B, H, n, K, V),
    )


@torch.library.custom_op(
    "archsearch::gla_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor? seq_idx, Tensor scores, Tensor q_since,"
    " Tensor k_until, Tensor total, Tensor states, Tensor d_o, Tensor? d_final)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    seq_idx: Tensor | None,
    scores: Tensor,
    q_since: Tensor,
    k_until: Tensor,
    total: Tensor,
    states: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and of the initial state."""
    d_states, d_initial = walk(q_since, d_o, total, d_final, reverse=True)
    dv = read(scores, d_o, k_until, d_states, transposed=True)
    dq, dk, dg, _ = gradients(q, k, v, g, seq_idx, d_o, states, d_states, scale)
    return dq, dk, dv, dg, d_initial


@gla_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, _, H, K), V = q.shape, v.shape[3]
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g))
    return dq, dk, dv, dg, v.new_empty(B, H, K, V, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, scale, initial_state, seq_idx = inputs
    ctx.set_materialize_grads(False)  # zeros for what is only saved would cost more than the backward
    ctx.save_for_backward(q, k, v, g, seq_idx, *output[2:])
    ctx.scale, ctx.has_initial = scale, initial_state is not None


def _backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, g, seq_idx, *saved = ctx.saved_tensors
    if d_o is None:
        d_o = torch.zeros_like(v)
    if d_final is not None:
        d_final = d_final.contiguous()
    dq, dk, dv, dg, d_initial = direct(gla_backward, q, k, v, g, ctx.scale, seq_idx, *saved, d_o, d_final)
    return dq, dk, dv, dg, None, d_initial if ctx.has_initial else None, None


gla_forward.register_autograd(_backward, setup_context=_save)


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Operands as the public function has checked them; q and k are taken in v's dtype."""
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    if seq_idx is not None:
        seq_idx = seq_idx.contiguous()
    o, final, *_ = direct(gla_forward, q.to(v.dtype), k.to(v.dtype), v, g, scale, initial_state, seq_idx)
    return o, final
