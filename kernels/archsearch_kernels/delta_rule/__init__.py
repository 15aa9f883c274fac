"""The delta rule, plain (DeltaNet) or with a scalar decay per head (Gated DeltaNet)."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels.delta_rule import reference
from archsearch_kernels.delta_rule.reference import delta_rule_recurrent as delta_rule_recurrent
from archsearch_kernels.dispatch import runs_kernel
from archsearch_kernels.packing import seq_idx_of

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunkwise delta rule for training and prefill, any T >= 1 (DeltaNet 2406.06484, Gated DeltaNet 2412.06464).

    q, k [B, T, G, K] with |k| = 1; v [B, T, H, V] with H a multiple of G (a key head serves H / G neighbouring value
    heads); beta [B, T, H] in (0, 2); g log decay <= 0 [B, T, H], None: no decay; scale None: K^-0.5; initial_state
    [B, H, K, V]; packed documents are numbered by `seq_idx` [B, T] or, where B is 1, begin at `cu_seqlens` [N + 1] (the
    initial state belongs to the first); chunk a power of two, None: what suits the device.

    Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 for float64 v). The kernel
    takes K and V from 16 to 256, multiplies in v's dtype, adds in float32 and takes log decays below -40 for -40.
    Raises ValueError for shapes or devices that do not fit together and if chunk is not a power of two.
    """
    _check(q, k, v, beta, g, initial_state, ("B", "T"))
    if cu_seqlens is not None:
        if seq_idx is not None or v.shape[0] != 1:
            raise ValueError(f"cu_seqlens goes with one row and without seq_idx; v is {tuple(v.shape)}")
        seq_idx = seq_idx_of(cu_seqlens, v.shape[1])
    if seq_idx is not None and (seq_idx.shape != v.shape[:2] or seq_idx.is_floating_point()):
        raise ValueError(f"seq_idx is {seq_idx.dtype} {tuple(seq_idx.shape)}; expected integers {tuple(v.shape[:2])}")
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ValueError(f"chunk {chunk} is not a power of two")
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if runs_kernel("delta_rule", v, _unsupported(k, v), implementation):
        from archsearch_kernels.delta_rule import chunk as kernel

        return kernel.delta_rule(q, k, v, beta, g, scale, initial_state, seq_idx, chunk)
    return reference.delta_rule(
        q, k, v, beta, g, scale=scale, initial_state=initial_state, seq_idx=seq_idx, chunk=chunk
    )


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, G, K], v [B, H, V], beta and g [B, H] (g None: no decay), state [B, H, K, V].

    Returns o [B, H, V] in v's dtype and the new state, which is `state` itself, written over, if `inplace`. The kernel
    has no gradient: where one is asked for, the reference runs. Raises ValueError for shapes or devices that do not
    fit together.
    """
    _check(q, k, v, beta, g, state, ("B",))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if runs_kernel("delta_rule", v, _unsupported_step(q, k, v, beta, g, state, inplace), implementation):
        from archsearch_kernels.delta_rule import step as kernel

        return kernel.delta_rule_step(q, k, v, beta, g, state, scale, inplace)
    return reference.delta_rule_step(q, k, v, beta, g, state, scale=scale, inplace=inplace)


def projected_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    *,
    max_beta: float = 1.0,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of (Gated) DeltaNet from its projections, in one launch.

    q, k [B, G, K] of any length, made unit; v [B, H, V]; beta [B, H], of which the step is max_beta sigmoid(beta);
    decay [B, H], of which the log decay is -e^A_log softplus(decay + dt_bias), A_log and dt_bias [H], or None all three
    (no decay); state [B, H, K, V]. Returns and raises as `delta_rule_step`, and ValueError for some of the three.
    """
    _check(q, k, v, beta, decay, state, ("B",), "decay")
    heads = v.shape[1:2]
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if (x is None) != (decay is None):
            raise ValueError(f"{name} is {'missing' if x is None else 'given'} and decay is not; expected all or none")
        if x is not None and (x.shape != heads or x.device != v.device):
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}; expected {tuple(heads)} on {v.device}")
    unsupported = _unsupported_step(q, k, v, beta, decay, state, inplace, A_log, dt_bias)
    if runs_kernel("projected_delta_rule_step", v, unsupported, implementation):
        from archsearch_kernels.delta_rule import step as kernel

        return kernel.projected_delta_rule_step(q, k, v, beta, decay, A_log, dt_bias, state, max_beta, inplace)
    return reference.projected_delta_rule_step(
        q, k, v, beta, decay, A_log, dt_bias, state, max_beta=max_beta, inplace=inplace
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    outer: tuple[str, ...],
    decay: str = "g",
) -> None:
    """Shapes and devices that fit v; `outer` names the axes before the heads, `decay` the argument g."""
    n = len(outer)
    form = ", ".join(outer)
    if v.dim() != n + 2:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected [{form}, H, V]")
    if k.dim() != n + 2 or k.shape[:n] != v.shape[:n] or k.shape[n] == 0 or v.shape[n] % k.shape[n]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}; expected [{form}, G, K] with v's {form} and G dividing {v.shape[n]} heads"
        )
    if q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected k's, {tuple(k.shape)}")
    for name, x in (("beta", beta), (decay, g)):
        if x is not None and x.shape != v.shape[:-1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {tuple(v.shape[:-1])}")
    expected = (v.shape[0], v.shape[n], k.shape[-1], v.shape[-1])
    if state is not None and state.shape != expected:
        raise ValueError(f"the state has shape {tuple(state.shape)}; expected [B, H, K, V] = {expected}")
    for name, x in (("q", q), ("k", k), ("beta", beta), (decay, g), ("the state", state)):
        if x is not None and x.device != v.device:
            raise ValueError(f"{name} is on {x.device}, v on {v.device}")


def _unsupported(k: Tensor, v: Tensor) -> str | None:
    if v.dtype not in TYPES:
        return f"it does not take {v.dtype}"
    if not (16 <= k.shape[-1] <= 256 and 16 <= v.shape[-1] <= 256):
        return f"it takes K and V from 16 to 256, not K = {k.shape[-1]} and V = {v.shape[-1]}"
    return None


def _unsupported_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    inplace: bool,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> str | None:
    given = (q, k, v, beta, g, state, A_log, dt_bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return "the kernel of one token has no gradient"
    if inplace and (state.stride(-1) != 1 or state.stride(-2) != state.shape[-1]):
        return "it writes only into states whose heads are contiguous"
    return _unsupported(k, v) or (None if state.dtype in TYPES else f"it does not take states in {state.dtype}")
