"""Rotary position embedding in one launch, of one tensor or of queries and keys together."""

from __future__ import annotations

from torch import Tensor

from archsearch_kernels import dispatch
from archsearch_kernels.eager import direct
from archsearch_kernels.rope import reference
from archsearch_kernels.rows import dtype_obstacle


def rope(x: Tensor, position: int | Tensor, theta: float, n_dims: int, *, implementation: str | None = None) -> Tensor:
    """Rotate the first `n_dims` features of x [B, T, H, D]; its tokens stand at position, position + 1, ...

    Half-split layout: feature i turns with feature i + n_dims / 2 (2104.09864). `position`: a number, or integers [B]
    (or one) on x's device, the start of every sequence. Angles are fp32 products, accurate up to a million.
    Raises ValueError for another rank, an odd or too large `n_dims`, and positions that do not fit.
    """
    _check("x", x, position, n_dims)
    if n_dims == 0 or x.numel() == 0 or not dispatch.runs_kernel("rope", x, _obstacle(x, n_dims), implementation):
        return reference.rope(x, position, theta, n_dims)
    from archsearch_kernels.rope.rotate import rope_op

    start, starts = _start(position)
    return direct(rope_op, x, start, starts, theta, n_dims, False)


def rope_qk(
    q: Tensor, k: Tensor, position: int | Tensor, theta: float, n_dims: int, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """`rope` of q [B, T, HQ, D] and k [B, T, HK, D] in one launch; both stand at the same positions."""
    _check("q", q, position, n_dims)
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or k.device != q.device:
        B, T, _, D = q.shape
        raise ValueError(f"k is {tuple(k.shape)} on {k.device}; expected ({B}, {T}, heads, {D}) on {q.device}")
    obstacle = _obstacle(q, n_dims) or (None if q.dtype == k.dtype else f"q is {q.dtype} and k {k.dtype}")
    empty = n_dims == 0 or q.numel() == 0 or k.numel() == 0
    if empty or not dispatch.runs_kernel("rope", q, obstacle, implementation):
        return reference.rope_qk(q, k, position, theta, n_dims)
    from archsearch_kernels.rope.rotate import rope_qk_op

    start, starts = _start(position)
    return direct(rope_qk_op, q, k, start, starts, theta, n_dims, False)


def _start(position: int | Tensor) -> tuple[int, Tensor | None]:
    return (0, position.reshape(-1)) if isinstance(position, Tensor) else (position, None)


def _obstacle(x: Tensor, n_dims: int) -> str | None:
    return dtype_obstacle(x) or (f"it does not rotate {n_dims} features" if n_dims > 1024 else None)


def _check(name: str, x: Tensor, position: int | Tensor, n_dims: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} is {tuple(x.shape)}; expected [B, T, H, D]")
    if n_dims % 2 or not 0 <= n_dims <= x.shape[-1]:
        raise ValueError(f"n_dims is {n_dims}; expected an even number up to the {x.shape[-1]} features of {name}")
    if isinstance(position, Tensor):
        fits = position.numel() in (1, x.shape[0]) and position.dim() <= 1 and position.device == x.device
        if not fits or position.is_floating_point():
            raise ValueError(
                f"position is {position.dtype} {tuple(position.shape)} on {position.device}; expected integers"
                f" ({x.shape[0]},) or one number on {x.device}"
            )
