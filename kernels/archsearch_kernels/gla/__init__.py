"""Gated linear attention: one decay per key feature and token (Yang et al., 2312.06635)."""

from __future__ import annotations

from torch import Tensor

from archsearch_kernels.dispatch import runs_kernel
from archsearch_kernels.eager import direct, direct_update
from archsearch_kernels.gla import operands, reference
from archsearch_kernels.gla.reference import gla_recurrent as gla_recurrent


def gla(
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
    """S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t, for training and prefill, any T >= 1.

    q, k [B, T, H, K]; v [B, T, H, V]; g log decay <= 0 [B, T, H, K]; scale None: K^-0.5; initial_state [B, H, K, V].
    `seq_idx` [B, T] numbers packed documents (the initial state belongs to the first), or `cu_seqlens` [N + 1] lists
    where those of a batch of 1 begin and end. `chunk`, a power of two, is the reference's; the kernel's is 64.
    Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 for float64 v).
    Raises ValueError for operands that do not fit together, and if chunk is not a power of two.
    """
    (B, T, H), K, V = operands.sizes("gla", q, v, 4)
    keys, meaning = (B, T, H, K), "[B, T, H, K]"
    operands.check(
        "gla",
        {
            "q": (q, keys, meaning),
            "k": (k, keys, meaning),
            "v": (v, (B, T, H, V), "[B, T, H, V]"),
            "g": (g, keys, meaning),
            "initial_state": (initial_state, (B, H, K, V), "[B, H, K, V]"),
            "seq_idx": (seq_idx, (B, T), "[B, T]"),
        },
    )
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk {chunk} is not a power of two")
    seq_idx = operands.documents("gla", seq_idx, cu_seqlens, v)
    if runs_kernel("gla", v, operands.unsupported(q, v, g), implementation):
        from archsearch_kernels.gla.chunk import gla as run

        return run(q, k, v, g, K**-0.5 if scale is None else scale, initial_state, seq_idx)
    return reference.gla(q, k, v, g, scale=scale, initial_state=initial_state, seq_idx=seq_idx, chunk=chunk)


def gla_step(
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
    """One token: q, k, g [B, H, K], v [B, H, V], state [B, H, K, V].

    Returns o [B, H, V] in v's dtype and the new state, which is `state` itself, written over, if `inplace`.
    Raises ValueError for operands that do not fit together.
    """
    (B, H), K, V = operands.sizes("gla_step", q, v, 3)
    keys, meaning = (B, H, K), "[B, H, K]"
    operands.check(
        "gla_step",
        {
            "q": (q, keys, meaning),
            "k": (k, keys, meaning),
            "v": (v, (B, H, V), "[B, H, V]"),
            "g": (g, keys, meaning),
            "state": (state, (B, H, K, V), "[B, H, K, V]"),
        },
    )
    if runs_kernel("gla_step", v, operands.step_unsupported(q, v, g, state, inplace, k), implementation):
        from archsearch_kernels.gla.step import step, step_inplace

        scale = K**-0.5 if scale is None else scale
        if inplace:
            return direct_update(step_inplace, state, q, k, v, g, state, scale), state
        return direct(step, q, k, v, g, state, scale)
    return reference.gla_step(q, k, v, g, state, scale=scale, inplace=inplace)
