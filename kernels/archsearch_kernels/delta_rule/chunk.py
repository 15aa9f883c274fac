"""The chunkwise delta rule on the GPU: launches, and the gradient from states that are walked again."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from archsearch_kernels.delta_rule.kernels.backward import delta_rule_gradients, delta_rule_walk_back
from archsearch_kernels.delta_rule.kernels.forward import delta_rule_pairs, delta_rule_walk
from archsearch_kernels.eager import direct

CHUNK = 64  # tokens: half the state traffic of 32, and the largest triangle whose inverse stays in registers

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? state, Tensor? seq_idx"


def chunk_of(n_tokens: int, chunk: int | None, dtype: torch.dtype) -> int:
    """Tokens of a chunk: what was asked for, between 16 and 64 and no more than the tokens need.

    By default 64, and 16 in float32, whose products are taken off the tensor cores and from registers.
    """
    own = 16 if dtype == torch.float32 else CHUNK
    return max(16, min(chunk or own, CHUNK, triton.next_power_of_2(n_tokens)))


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Checked arguments; shapes as in `archsearch_kernels.delta_rule.delta_rule`."""
    q, k, v = (_rows(x.to(v.dtype)) for x in (q, k, v))  # products are taken in v's type
    g = None if g is None else g.contiguous()
    seq_idx = None if seq_idx is None else seq_idx.contiguous()
    state = None if initial_state is None else initial_state.contiguous()
    C = chunk_of(v.shape[1], chunk, v.dtype)
    o, final, *_ = direct(_forward, q, k, v, beta.contiguous(), g, state, seq_idx, scale, C)
    return o, final


def _rows(x: Tensor) -> Tensor:
    """x [B, T, H, D], copied only if its features are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _shared(q: Tensor, k: Tensor, v: Tensor, scale: float, chunk: int) -> dict[str, Any]:
    """The arguments that every kernel takes."""
    (_, T, H, _), (G, K) = v.shape, k.shape[2:]
    names = ("q_b", "q_t", "q_h", "k_b", "k_t", "k_h")
    return {
        "T": T, "N": triton.cdiv(T, chunk), "H": H, "RATIO": H // G, "scale": scale,
        **dict(zip(names, (*q.stride()[:3], *k.stride()[:3]), strict=True)),
        "K": K, "C": chunk,
    }  # fmt: skip


def _walked(q: Tensor, k: Tensor, v: Tensor, scale: float, chunk: int) -> dict[str, Any]:
    """Those of the walks besides."""
    heads, (K, V) = v.shape[0] * v.shape[2], (k.shape[3], v.shape[3])
    return _shared(q, k, v, scale, chunk) | {"heads": heads, "V": V, "KP": max(16, triton.next_power_of_2(K))}


def _sizes(v: Tensor) -> dict[str, int]:
    return {"T": v.shape[1], "BH": v.shape[0] * v.shape[2]}


def _walk(
    q: Tensor, k: Tensor, v: Tensor, made: tuple[Tensor, ...], state: Tensor | None, into: dict[str, Any],
    scale: float, chunk: int,
) -> None:  # fmt: skip
    B, _, H, V = v.shape
    inverse, reads, since, until = made
    arguments = {
        "q": q, "k": k, "v": v, "inverse": inverse, "reads": reads, "since": since, "until": until, "state": state,
        "o": None, "final": None, "y": None, "states": None, **into,
        **_walked(q, k, v, scale, chunk),
        "v_b": v.stride(0), "v_t": v.stride(1), "v_h": v.stride(2),
    }  # fmt: skip
    delta_rule_walk.launch(lambda c: (B * H * triton.cdiv(V, c["BV"]),), arguments, sizes=_sizes(v))


@torch.library.custom_op(
    "archsearch::delta_rule",
    mutates_args=(),
    schema=f"({_TENSORS}, float scale, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, seq_idx: Tensor | None,
    scale: float, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """o, the last state, and of every chunk Y, P, since and until (see `kernels`)."""
    o, final, *made = _fake_forward(q, k, v, beta, g, state, seq_idx, scale, chunk)
    inverse, reads, since, until = made
    arguments = {
        "q": q, "k": k, "beta": beta, "g": g, "seq_idx": seq_idx,
        "inverse": inverse, "reads": reads, "since": since, "until": until,
        **_shared(q, k, v, scale, chunk), "KP": max(16, triton.next_power_of_2(k.shape[3])),
    }  # fmt: skip
    n_chunks = since.shape[0] * since.shape[1] * since.shape[2]
    delta_rule_pairs.launch(lambda c: (n_chunks,), arguments, sizes=_sizes(v))
    _walk(q, k, v, (inverse, reads, since, until), state, {"o": o, "final": final}, scale, chunk)
    return o, final, inverse, reads, since, until


@_forward.register_fake
def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, seq_idx: Tensor | None,
    scale: float, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, T, H, V), K = v.shape, k.shape[3]
    n = (T + chunk - 1) // chunk
    o, final = v.new_empty(B, T, H, V), v.new_empty(B, H, K, V, dtype=torch.float32)
    inverse, reads = (v.new_empty(B, H, n, chunk, chunk) for _ in range(2))
    since, until = (v.new_empty(B, H, n, chunk, dtype=torch.float32) for _ in range(2))
    return o, final, inverse, reads, since, until


@torch.library.custom_op(
    "archsearch::delta_rule_backward",
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor inverse, Tensor reads, Tensor since, Tensor until, Tensor d_o, Tensor? d_final, "
    "float scale, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, seq_idx: Tensor | None,
    inverse: Tensor, reads: Tensor, since: Tensor, until: Tensor, d_o: Tensor, d_final: Tensor | None,
    scale: float, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, beta, g (empty without g) and the initial state."""
    (B, T, H, V), (G, K) = v.shape, k.shape[2:]
    dv, d_beta, d_initial = v.new_empty(v.shape), torch.empty_like(beta), v.new_empty(B, H, K, V, dtype=torch.float32)
    dg = v.new_empty(0) if g is None else torch.empty_like(g)
    dq, dk = (v.new_empty(B, T, H, K) for _ in range(2))  # of every value head
    y, states, d_states = v.new_empty(v.shape), *(v.new_empty(B, H, since.shape[2], K, V) for _ in range(2))
    scratch = v.new_empty(B, H, since.shape[2], 2, chunk, chunk)
    _walk(q, k, v, (inverse, reads, since, until), state, {"y": y, "states": states}, scale, chunk)

    arguments = {
        "q": q, "k": k, "do": d_o, "inverse": inverse, "reads": reads, "since": since, "until": until,
        "d_final": d_final, "dv": dv, "d_initial": d_initial, "d_states": d_states, **_walked(q, k, v, scale, chunk),
    }  # fmt: skip
    delta_rule_walk_back.launch(lambda c: (B * H * triton.cdiv(V, c["BV"]),), arguments, sizes=_sizes(v))

    arguments = {
        "q": q, "k": k, "beta": beta, "g": g, "seq_idx": seq_idx, "do": d_o, "y": y, "dv": dv,
        "states": states, "d_states": d_states, "scratch": scratch, "dq": dq, "dk": dk, "d_beta": d_beta,
        "dg": None if g is None else dg,
        **_shared(q, k, v, scale, chunk), "V": V,
    }  # fmt: skip
    n_chunks = B * H * since.shape[2]
    delta_rule_gradients.launch(lambda c: (n_chunks,), arguments, sizes=_sizes(v))
    if G != H:
        dq, dk = (x.view(B, T, G, H // G, K).sum(3) for x in (dq, dk))
    return dq, dk, dv, d_beta, dg, d_initial


@_backward.register_fake
def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, seq_idx: Tensor | None,
    inverse: Tensor, reads: Tensor, since: Tensor, until: Tensor, d_o: Tensor, d_final: Tensor | None,
    scale: float, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, _, H, V), K = v.shape, k.shape[3]
    dq, dk, dv = (v.new_empty(x.shape) for x in (q, k, v))
    dg = v.new_empty(0) if g is None else torch.empty_like(g)
    return dq, dk, dv, torch.empty_like(beta), dg, v.new_empty(B, H, K, V, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.chunk = inputs
    made = output[2:]
    ctx.save_for_backward(*tensors, *made)
    ctx.mark_non_differentiable(*made)
    ctx.set_materialize_grads(False)  # else zeros as large as `made`


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, state, seq_idx, *made = ctx.saved_tensors
    d_o = torch.zeros_like(v) if grads[0] is None else grads[0]
    d_final = None if grads[1] is None else grads[1].contiguous()
    dq, dk, dv, d_beta, dg, d_state = direct(
        _backward, q, k, v, beta, g, state, seq_idx, *made, d_o.contiguous(), d_final, ctx.scale, ctx.chunk
    )
    given_g, given_state = g is not None, state is not None
    return (
        dq, dk, dv, d_beta, dg if given_g else None, d_state.to(state.dtype) if given_state else None,
        None, None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_keep)
