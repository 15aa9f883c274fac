"""Linear attention with one decay per head: RetNet, Lightning, simple GLA and the SSD of Mamba-2."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels.dispatch import runs_kernel
from archsearch_kernels.packing import seq_idx_of
from archsearch_kernels.scalar_decay import reference
from archsearch_kernels.scalar_decay.reference import scalar_decay_recurrent as scalar_decay_recurrent
from archsearch_kernels.scalar_decay.reference import ssd_operands as ssd_operands

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def scalar_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = S_t^T q_t scale with S_t = e^{g_t} S_{t-1} + k_t v_t^T, for training and prefill (2307.08621, 2405.21060).

    q, k [B, T, G, K], each group serving H / G heads; v [B, T, H, V]; g log decay <= 0, [B, T, H] or fixed [H];
    scale None: K^-0.5; initial_state [B, H, K, V]. Packed documents: `seq_idx` [B, T] numbers them, or, for B = 1,
    `cu_seqlens` [N + 1] says where they begin; the initial state belongs to the first. chunk: of the reference, a power
    of two; the kernel chooses its own. implementation: `auto`, `triton` or `reference`.
    The kernel takes K and V from 16 to 256 in float16, bfloat16 and float32.
    Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 for float64 v).
    Raises ValueError for shapes that do not fit together.
    """
    _check(q, k, v, g, 4)
    (B, T, H, V), K = v.shape, q.shape[3]
    if initial_state is not None and initial_state.shape != (B, H, K, V):
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}; expected {(B, H, K, V)}")
    if cu_seqlens is not None:
        if seq_idx is not None or B != 1:
            raise ValueError(f"cu_seqlens goes with one row and without seq_idx; q has shape {tuple(q.shape)}")
        seq_idx = seq_idx_of(cu_seqlens, T)
    if seq_idx is not None and (seq_idx.shape != (B, T) or seq_idx.is_floating_point()):
        raise ValueError(f"seq_idx is {seq_idx.dtype} {tuple(seq_idx.shape)}; expected integers {(B, T)}")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk {chunk} is not a power of two")
    if runs_kernel("scalar_decay", v, _unsupported(q, v), implementation):
        from archsearch_kernels.scalar_decay.chunk import scalar_decay_chunks

        q, k, v_ = _alike(q, k, v)
        o, state = scalar_decay_chunks(q, k, v_, g, initial_state, seq_idx, K**-0.5 if scale is None else scale)
        return o.to(v.dtype), state
    return reference.scalar_decay(q, k, v, g, scale=scale, initial_state=initial_state, seq_idx=seq_idx, chunk=chunk)


def scalar_decay_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, G, K], v [B, H, V], g [B, H] or [H], state [B, H, K, V].

    Returns o [B, H, V] in v's dtype and the new state, written into `state` if `inplace`. The kernel has no gradient:
    where one is asked for, the reference runs. Raises ValueError for shapes that do not fit together.
    """
    _check(q, k, v, g, 3)
    (B, H, V), K = v.shape, q.shape[2]
    if state.shape != (B, H, K, V):
        raise ValueError(f"state has shape {tuple(state.shape)}; expected {(B, H, K, V)}")
    if runs_kernel("scalar_decay_step", v, _no_step(q, v, state, k, g), implementation):
        from archsearch_kernels.scalar_decay.step import scalar_decay_token_step

        scale = K**-0.5 if scale is None else scale
        return scalar_decay_token_step(q, k, v, g, None, None, None, state, scale, inplace)
    return reference.scalar_decay_step(q, k, v, g, state, scale=scale, inplace=inplace)


def ssd_step(
    C: Tensor,
    B: Tensor,
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    state: Tensor,
    *,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of Mamba-2's state space duality from its projections, in one launch (2405.21060).

    C, B [batch, G, N]; u [batch, H, P]; dt [batch, H], of which softplus(dt + dt_bias) is the step size and -e^A_log
    times that the log decay; A_log, dt_bias [H]; D [H], the skip's weights; state [batch, H, N, P]. Returns the output
    [batch, H, P] in u's dtype and the new state, written into `state` if `inplace`. The kernel has no gradient: where
    one is asked for, the reference runs. Raises ValueError for shapes that do not fit together.
    """
    _check(C, B, u, None, 3, ("C", "B", "u"))
    (batch, H, P), N = u.shape, C.shape[2]
    if dt.shape != (batch, H):
        raise ValueError(f"dt has shape {tuple(dt.shape)}; expected {(batch, H)}")
    if state.shape != (batch, H, N, P):
        raise ValueError(f"state has shape {tuple(state.shape)}; expected {(batch, H, N, P)}")
    if dt.device != u.device:
        raise ValueError(f"dt is on {dt.device}, u on {u.device}")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias), ("D", D)):
        if x.shape != (H,) or x.device != u.device:
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}; expected {(H,)} on {u.device}")
    unsupported = _no_step(C, u, state, B, dt, A_log, dt_bias, D)
    if runs_kernel("ssd_step", u, unsupported, implementation):
        from archsearch_kernels.scalar_decay.step import scalar_decay_token_step

        return scalar_decay_token_step(C, B, u, dt, A_log, dt_bias, D, state, 1.0, inplace)
    return reference.ssd_step(C, B, u, dt, A_log, dt_bias, D, state, inplace=inplace)


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, rank: int, names: tuple[str, str, str] = ("q", "k", "v")
) -> None:
    """Shapes and devices that fit v, in the words of the caller's arguments."""
    of_q, of_k, of_v = names
    if v.dim() != rank or v.numel() == 0:
        expected = "[B, T, H, V]" if rank == 4 else "[B, H, V]"
        raise ValueError(f"{of_v} has shape {tuple(v.shape)}; expected {expected}")
    *outer, H, _ = v.shape
    if q.dim() != rank or list(q.shape[:-2]) != outer or q.numel() == 0 or H % q.shape[-2]:
        shapes = f"{of_q} has shape {tuple(q.shape)}, {of_v} {tuple(v.shape)}"
        raise ValueError(f"{shapes}; {of_v}'s heads must be a multiple of {of_q}'s")
    if k.shape != q.shape:
        raise ValueError(f"{of_k} has shape {tuple(k.shape)}, {of_q} {tuple(q.shape)}; they must be the same")
    if g is not None and g.shape not in ((*outer, H), (H,)):
        raise ValueError(f"g has shape {tuple(g.shape)}; expected {(*outer, H)} or {(H,)}")
    for name, x in ((of_q, q), (of_k, k), ("g", g)):
        if x is not None and x.device != v.device:
            raise ValueError(f"{name} is on {x.device}, {of_v} on {v.device}")


def _unsupported(q: Tensor, v: Tensor) -> str | None:
    (K, V), dtype = (q.shape[-1], v.shape[-1]), v.dtype
    if dtype not in DTYPES or q.dtype not in DTYPES:
        return f"q and v are {q.dtype} and {dtype}"
    if not (16 <= K <= 256 and 16 <= V <= 256):
        return f"K = {K} and V = {V} are not both from 16 to 256"
    return None


def _no_step(q: Tensor, v: Tensor, state: Tensor, *others: Tensor) -> str | None:
    """Why the kernel of one token does not take these operands, or None."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, v, state, *others)):
        return "a single step has no gradient"
    if state.dtype == torch.float64:
        return "the state is float64"
    return _unsupported(q, v)


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the widest of their dtypes."""
    if q.dtype == k.dtype == v.dtype:
        return q, k, v
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)
