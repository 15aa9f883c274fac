"""Linear attention with one decay per head in chunks: the operators `archsearch::scalar_decay` and its backward.

Two launches forward (states, outputs) and three or four backward: the states are kept for it where they are small, else
walked again. q, k, v and the output's gradient are read with their strides, so slices of a projection are not copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.launch import Config
from archsearch_kernels.scalar_decay.kernels.backward import scalar_decay_key_gradients, scalar_decay_query_gradients
from archsearch_kernels.scalar_decay.kernels.forward import scalar_decay_outputs, scalar_decay_states

PROGRAMS = 528  # four a multiprocessor of the largest GPUs: enough to share a group's heads no further


def scalar_decay_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and final state [B, H, K, V] in float32; shapes as in the reference."""
    o, final, _ = direct(_forward, q, k, v, g, initial_state, seq_idx, scale)
    return o, final


def chunk_length(T: int, dtype: torch.dtype) -> int:
    """64 tokens fill a warp group's tensor core tile; float32 ones take half as many for their memory."""
    C = 32 if dtype.itemsize == 4 else 64
    while C > 16 and C >= 2 * T:
        C //= 2
    return C


def head_parts(B: int, chunks: int, H: int, G: int, k_width: int) -> int:
    """How many programs share a group's heads in the backward: more where there would be too few."""
    if k_width > 128:
        return H // G  # a program has no registers to sum in
    parts = 1
    while B * chunks * G * parts < PROGRAMS and (H // G) % (2 * parts) == 0 and 4 * parts <= H // G:
        parts *= 2
    return parts


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _rows(x: Tensor) -> Tensor:
    """With features side by side in memory, where 16-byte loads find them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_b": x.stride(0), f"{name}_t": x.stride(1), f"{name}_h": x.stride(2)}


def _flags(k: Tensor, v: Tensor, g: Tensor) -> dict[str, Any]:
    (T, H, V), (G, K) = v.shape[1:], k.shape[2:]
    return {
        "R": H // G,
        "K": K,
        "V": V,
        "KP": _power_of_two(K),
        "VP": _power_of_two(V),
        "C": chunk_length(T, v.dtype),
        "FIXED": g.dim() == 1,
        "PRECISION": "ieee" if v.dtype == torch.float32 else "tf32",  # tf32x3: wrong code on Hopper
    }


def _n_chunks(v: Tensor) -> int:
    return -(-v.shape[1] // chunk_length(v.shape[1], v.dtype))


def _empty_states(k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], _n_chunks(v), v.shape[2], k.shape[3], v.shape[3])


def _empty_state(k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def _walk(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    seq_idx: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    scale: float,
    reverse: bool = False,
) -> Tensor:
    """The state that each chunk finds [B, chunks, H, K, V], from `first` to `last`."""
    (B, T, H, V), K = v.shape, k.shape[3]
    states = _empty_states(k, v)

    def programs(c: Config) -> tuple[int, ...]:
        return (B * H * -(-V // c["BV"]) * -(-K // c["BK"]),)

    operands = {"k": k, "v": v, "g": g, "seq": seq_idx, "first": first, "states": states, "last": last}
    numbers = {"T": T, "H": H, "scale": scale, **_strides("k", k), **_strides("v", v)}
    arguments = {**operands, **numbers, **_flags(k, v, g), "REVERSE": reverse}
    scalar_decay_states.launch(programs, arguments, sizes={"T": T, "BH": B * H})
    return states


@torch.library.custom_op(
    "archsearch::scalar_decay",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? seq_idx, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, g, first, seq_idx = _laid_out(q, k, v, g, initial_state, seq_idx)
    (B, T, H, V) = v.shape
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = _empty_state(k, v)
    states = _walk(k, v, g, seq_idx, first, final, scale)
    chunks = states.shape[1]

    def programs(c: Config) -> tuple[int, ...]:
        return (B * chunks * H * -(-V // c["BV"]),)

    operands = {"q": q, "k": k, "v": v, "g": g, "seq": seq_idx, "states": states, "o": o}
    numbers = {"T": T, "H": H, "scale": scale, **_strides("q", q), **_strides("k", k), **_strides("v", v)}
    scalar_decay_outputs.launch(programs, {**operands, **numbers, **_flags(k, v, g)}, sizes={"T": T, "BH": B * H})
    return o, final, states


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), _empty_state(k, v), _empty_states(k, v)


@torch.library.custom_op(
    "archsearch::scalar_decay_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? seq_idx, float scale,"
    " Tensor? states, Tensor d_o, Tensor? d_final, bool with_g) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    scale: float,
    states: Tensor | None,
    d_o: Tensor,
    d_final: Tensor | None,
    with_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, g, first, seq_idx = _laid_out(q, k, v, g, initial_state, seq_idx)
    d_o = _rows(d_o)
    (B, T, H, _), (G, K) = v.shape, k.shape[2:]
    if states is None:
        states = _walk(k, v, g, seq_idx, first, None, scale)
    d_first = v.new_empty(0) if initial_state is None else _empty_state(k, v)
    d_last = None if d_final is None else d_final.contiguous()
    d_states = _walk(q, d_o, g, seq_idx, d_last, None if initial_state is None else d_first, scale, reverse=True)
    chunks = states.shape[1]
    parts = head_parts(B, chunks, H, G, K)
    d_q = torch.empty((parts, B, T, G, K), dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
    d_k = torch.empty_like(d_q)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_g = v.new_empty((B, T, H) if with_g else 0, dtype=torch.float32)
    read = torch.empty_like(d_g) if with_g else None

    def programs(c: Config) -> tuple[int, ...]:
        return (B * chunks * G * parts,)

    operands = {"q": q, "k": k, "v": v, "g": g, "seq": seq_idx, "states": states}
    numbers = {"B": B, "T": T, "H": H, "scale": scale, **_strides("q", q), **_strides("k", k), **_strides("v", v)}
    options = {**numbers, **_strides("o", d_o), **_flags(k, v, g), "PARTS": parts}
    sizes = {"T": T, "BH": B * H}
    outputs = {"d_o": d_o, "d_q": d_q, "read": read}
    scalar_decay_query_gradients.launch(programs, {**operands, **outputs, **options}, sizes=sizes)
    outputs = {"d_states": d_states, "d_o": d_o, "read": read, "d_k": d_k, "d_v": d_v, "d_g": d_g if with_g else None}
    scalar_decay_key_gradients.launch(programs, {**operands, **outputs, **options}, sizes=sizes)
    if parts > 1:
        d_q, d_k = d_q.sum(0).to(q.dtype), d_k.sum(0).to(k.dtype)
    else:
        d_q, d_k = d_q.view(B, T, G, K), d_k.view(B, T, G, K)
    if with_g:
        d_g = (d_g.sum((0, 1)) if g.dim() == 1 else d_g).to(g.dtype)
    if initial_state is not None:
        d_first = d_first.to(initial_state.dtype)
    return d_q, d_k, d_v, d_g, d_first


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    scale: float,
    states: Tensor | None,
    d_o: Tensor,
    d_final: Tensor | None,
    with_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return v.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return like(q), like(k), like(v), like(g) if with_g else v.new_empty(0, dtype=torch.float32), like(initial_state)


def _laid_out(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    first = None if initial_state is None else initial_state.contiguous()
    documents = None if seq_idx is None else seq_idx.contiguous()
    return _rows(q), _rows(k), _rows(v), g.contiguous(), first, documents


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, initial_state, seq_idx, scale = inputs
    states = output[2]
    ctx.set_materialize_grads(False)
    keeps = states.numel() <= 2 * v.numel()  # larger ones cost more memory than walking the chunks again costs time
    ctx.save_for_backward(q, k, v, g, initial_state, seq_idx, states if keeps else None)
    ctx.scale = scale


def _differentiate(
    ctx: Any, d_o: Tensor | None, d_final: Tensor | None, d_states: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial_state, seq_idx, states = ctx.saved_tensors  # nobody has a use for the gradient of states
    if d_o is None:
        d_o = torch.zeros_like(v)
    with_g = ctx.needs_input_grad[3]
    d_q, d_k, d_v, d_g, d_first = direct(
        _backward, q, k, v, g, initial_state, seq_idx, ctx.scale, states, d_o, d_final, with_g
    )
    return d_q, d_k, d_v, d_g if with_g else None, None if initial_state is None else d_first, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
