"""Kimi delta attention (2510.26692): the delta rule with one decay per key feature and token."""

from __future__ import annotations

from torch import Tensor

from archsearch_kernels.dispatch import runs_kernel
from archsearch_kernels.gla import operands
from archsearch_kernels.kda import reference
from archsearch_kernels.kda.reference import kda_recurrent as kda_recurrent


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T and o_t = scale S_t^T q_t, any T >= 1.

    q, k [B, T, H, K] with |k| = 1; v [B, T, H, V]; beta [B, T, H]; g log decay <= 0 [B, T, H, K]; scale None: K^-0.5;
    initial_state [B, H, K, V]. `seq_idx` [B, T] numbers packed documents (the initial state belongs to the first), or
    `cu_seqlens` [N + 1] lists where those of a batch of 1 begin and end. `chunk`, a power of two or None, is the
    reference's; the kernel's is 64. Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32
    (float64 for float64 v). Raises ValueError for operands that do not fit together and a chunk of another length.
    """
    (B, T, H), K, V = operands.sizes("kda", q, v, 4)
    keys, meaning = (B, T, H, K), "[B, T, H, K]"
    operands.check(
        "kda",
        {
            "q": (q, keys, meaning),
            "k": (k, keys, meaning),
            "v": (v, (B, T, H, V), "[B, T, H, V]"),
            "beta": (beta, (B, T, H), "[B, T, H]"),
            "g": (g, keys, meaning),
            "initial_state": (initial_state, (B, H, K, V), "[B, H, K, V]"),
            "seq_idx": (seq_idx, (B, T), "[B, T]"),
        },
    )
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ValueError(f"chunk {chunk} is not a power of two")
    seq_idx = operands.documents("kda", seq_idx, cu_seqlens, v)
    if runs_kernel("kda", v, operands.unsupported(q, v, g), implementation):
        from archsearch_kernels.kda.chunk import kda as run

        return run(q, k, v, beta, g, K**-0.5 if scale is None else scale, initial_state, seq_idx)
    return reference.kda(q, k, v, beta, g, scale=scale, initial_state=initial_state, seq_idx=seq_idx, chunk=chunk)


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: q, k, g [B, H, K], v [B, H, V], beta [B, H], state [B, H, K, V].

    Returns o [B, H, V] in v's dtype and the new state, which is `state` itself, written over, if `inplace`.
    Raises ValueError for operands that do not fit together.
    """
    (B, H), K, V = operands.sizes("kda_step", q, v, 3)
    keys, meaning = (B, H, K), "[B, H, K]"
    operands.check(
        "kda_step",
        {
            "q": (q, keys, meaning),
            "k": (k, keys, meaning),
            "v": (v, (B, H, V), "[B, H, V]"),
            "beta": (beta, (B, H), "[B, H]"),
            "g": (g, keys, meaning),
            "state": (state, (B, H, K, V), "[B, H, K, V]"),
        },
    )
    if runs_kernel("kda_step", v, operands.step_unsupported(q, v, g, state, inplace, k, beta), implementation):
        from archsearch_kernels.kda.step import kda_step as run

        return run(q, k, v, beta, g, None, None, state, K**-0.5 if scale is None else scale, inplace)
    return reference.kda_step(q, k, v, beta, g, state, scale=scale, inplace=inplace)


def projected_kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token from its projections, in one launch.

    q, k [B, H, K] of any length, made unit; v [B, H, V]; beta [B, H], of which the step is sigmoid(beta); decay
    [B, H, K], of which the log decay is -e^A_log softplus(decay + dt_bias), A_log [H], dt_bias [H K]; state
    [B, H, K, V]. Returns and raises as `kda_step`.
    """
    (B, H), K, V = operands.sizes("projected_kda_step", q, v, 3)
    keys, meaning = (B, H, K), "[B, H, K]"
    operands.check(
        "projected_kda_step",
        {
            "q": (q, keys, meaning),
            "k": (k, keys, meaning),
            "v": (v, (B, H, V), "[B, H, V]"),
            "beta": (beta, (B, H), "[B, H]"),
            "decay": (decay, keys, meaning),
            "A_log": (A_log, (H,), "[H]"),
            "dt_bias": (dt_bias, (H * K,), "[H K]"),
            "state": (state, (B, H, K, V), "[B, H, K, V]"),
        },
    )
    unsupported = operands.step_unsupported(q, v, decay, state, inplace, k, beta, A_log, dt_bias)
    if runs_kernel("projected_kda_step", v, unsupported, implementation):
        from archsearch_kernels.kda.step import kda_step as run

        return run(q, k, v, beta, decay, A_log, dt_bias, state, K**-0.5, inplace)
    return reference.projected_kda_step(q, k, v, beta, decay, A_log, dt_bias, state, inplace=inplace)
