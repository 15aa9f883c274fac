"""Host code of RMSNorm: one launch forward; backward one launch, and one that sums the weight's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.lasting import kept
from archsearch_kernels.rms_norm.kernels import (
    AFTER,
    BEFORE,
    NONE,
    WIDEST_BACKWARD,
    backward_elements,
    rms_norm_backward,
    rms_norm_backward_wide,
    rms_norm_forward,
)
from archsearch_kernels.rows import as_rows, multiprocessors, persistent_programs
from archsearch_kernels.rows.kernels import sum_partials

FEWEST_ELEMENTS = 8_192  # that are worth a program of their own: fewer, and summing the partial sums costs more
ELEMENTS_AT_ONCE = 8_192  # in the registers of a multiprocessor's programs: 16 a thread of 16 warps
WIDTH = 16_384  # columns of wider rows whose sums for the weight fill half of a multiprocessor's registers


def _forward(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    eps: float,
    groups: int = 1,
    gate: int = NONE,
    sigmoid: bool = False,
) -> Tensor:
    """Writes y and h; returns 1 / rms [rows, groups]."""
    C = x.shape[-1] // groups
    n_rows = x.numel() // x.shape[-1]
    rstd = torch.empty(n_rows, groups, dtype=torch.float32, device=x.device)
    given, inner, strides = as_rows(x, *([] if other is None else [other]))
    rms_norm_forward.launch(
        lambda c: (-(-n_rows // c["BR"]) * groups,),
        {
            "x": given[0], "other": None if other is None else given[1],
            "weight": None if weight is None else weight.contiguous(), "y": y, "h": h, "rstd": rstd,
            "n_rows": n_rows, "eps": eps, "x_outer": strides[0][0], "x_step": strides[0][1],
            "other_outer": strides[-1][0], "other_step": strides[-1][1],
            "C": C, "GROUPS": groups, "INNER": inner, "GATE": gate, "SIGMOID": sigmoid,
        },
        sizes={"rows": n_rows},
    )  # fmt: skip
    return rstd


def _backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    dx_narrow: Tensor | None,
    dgate: Tensor | None,
    groups: int = 1,
    place: int = NONE,
    sigmoid: bool = False,
) -> Tensor | None:
    """Writes dx, dx_narrow and dgate; returns the gradient of the weight."""
    width = x.shape[-1]
    C = width // groups
    n_rows = x.numel() // width
    present = {"dy": dy, "x": x, "dh": dh, "gate": gate}
    tensors, inner, strides = as_rows(*(t for t in present.values() if t is not None))
    rows = dict(zip((n for n, t in present.items() if t is not None), zip(tensors, strides, strict=True), strict=True))
    arguments: dict[str, Any] = {"rstd": rstd, "n_rows": n_rows}
    for name in present:
        tensor, (outer, step) = rows.get(name, (None, (0, 0)))
        arguments |= {name: tensor, f"{name}_outer": outer, f"{name}_step": step}
    is_wide = C > WIDEST_BACKWARD
    if is_wide:
        programs = min(n_rows, multiprocessors(x.device.type, x.device.index))  # one program fills one
    else:
        each = max(1, ELEMENTS_AT_ONCE // backward_elements(C, gate is not None))
        programs = persistent_programs(n_rows, max(1, FEWEST_ELEMENTS // C), each, x.device)
    partial = None
    if weight is not None:
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    arguments |= {
        "weight": None if weight is None else weight.contiguous(), "partial": partial, "programs": programs,
        "dx": dx, "dx_narrow": dx_narrow, "dgate": dgate,
        "C": C, "GROUPS": groups, "INNER": inner, "GATE": place, "SIGMOID": sigmoid,
    }  # fmt: skip
    if is_wide:
        parts = -(-C // WIDTH)
        rms_norm_backward_wide.launch(
            lambda c: (programs * groups * parts,), arguments | {"WIDTH": WIDTH}, sizes={"rows": n_rows}
        )
    else:
        rms_norm_backward.launch(lambda c: (programs * groups,), arguments, sizes={"rows": n_rows})
    if partial is None or weight is None:
        return None
    dweight = torch.empty(width, dtype=weight.dtype, device=x.device)
    sum_partials.launch(
        lambda c: (-(-width // c["BD"]), 1),
        {"partial": partial, "weight": dweight, "bias": None, "P": programs, "D": width, "J": 1, "W": 1},
        sizes={"P": programs},
    )
    return dweight


def even_weight(x: Tensor) -> Tensor:
    """C^-1/2 [C], with which RMSNorm makes vectors of length 1."""
    C = x.shape[-1]
    return kept(x.device, ("even_weight", C), lambda: torch.full((C,), C**-0.5, device=x.device))


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _nothing(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=x.device)


@torch.library.custom_op(
    "archsearch::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? residual, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
def rms_norm_op(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y = _like(x, dtype)
    h = None if residual is None else _like(x, torch.promote_types(x.dtype, residual.dtype))
    rstd = _forward(x, residual, weight, y, h, eps)
    return y, _nothing(x, x.dtype) if h is None else h, rstd


@rms_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0)
    if residual is not None:
        h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape, dtype=dtype), h, x.new_empty((rows, 1), dtype=torch.float32)


@torch.library.custom_op(
    "archsearch::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, ScalarType narrow)"
    " -> (Tensor, Tensor, Tensor)",
)
def rms_norm_backward_op(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, narrow: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of h, the same as `narrow` if that is another dtype, and the weight's."""
    dx = _like(h)
    dx_narrow = None if narrow == h.dtype else _like(h, narrow)
    dweight = _backward(dy, dh, h, None, weight, rstd, dx, dx_narrow, None)
    return (
        dx,
        _nothing(h, narrow) if dx_narrow is None else dx_narrow,
        _nothing(h, torch.float32) if dweight is None else dweight,
    )


@rms_norm_backward_op.register_fake
def _(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, narrow: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        h.new_empty(0 if narrow == h.dtype else h.shape, dtype=narrow),
        h.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, _, _ = inputs
    _, h, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x if residual is None else h, weight, rstd)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype


def _gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Any, ...]:
    h, weight, rstd = ctx.saved_tensors
    dtypes = {ctx.x_dtype, ctx.residual_dtype or ctx.x_dtype}
    narrow = next(iter(dtypes - {h.dtype}), h.dtype)
    if ctx.residual_dtype is None:
        dh = None
    if dy is None:
        if dh is None:
            return None, None, None, None, None
        made = {h.dtype: dh, narrow: dh.to(narrow)}
        dweight = None
    else:
        dx, dx_narrow, dweight = direct(rms_norm_backward_op, dy, dh, h, weight, rstd, narrow)
        made = {narrow: dx_narrow, h.dtype: dx}
    return (
        made[ctx.x_dtype],
        None if weight is None else dweight,
        None if ctx.residual_dtype is None else made[ctx.residual_dtype],
        None,
        None,
    )


rms_norm_op.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op(
    "archsearch::gated_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor gate, Tensor? weight, float eps, bool sigmoid, bool before, int groups)"
    " -> (Tensor, Tensor)",
)
def gated_rms_norm_op(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, sigmoid: bool, before: bool, groups: int
) -> tuple[Tensor, Tensor]:
    y = _like(x)
    return y, _forward(x, gate, weight, y, None, eps, groups, BEFORE if before else AFTER, sigmoid)


@gated_rms_norm_op.register_fake
def _(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, sigmoid: bool, before: bool, groups: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.numel() // x.shape[-1], groups), dtype=torch.float32)


@torch.library.custom_op(
    "archsearch::gated_rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor gate, Tensor? weight, Tensor rstd, bool sigmoid, bool before)"
    " -> (Tensor, Tensor, Tensor)",
)
def gated_rms_norm_backward_op(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, sigmoid: bool, before: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate = _like(x), _like(gate)
    place = BEFORE if before else AFTER
    dweight = _backward(dy, None, x, gate, weight, rstd, dx, None, dgate, rstd.shape[1], place, sigmoid)
    return dx, dgate, _nothing(x, torch.float32) if dweight is None else dweight


@gated_rms_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, sigmoid: bool, before: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = x.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dweight


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, weight, _, ctx.sigmoid, ctx.before, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gate, weight, output[1])


def _gated_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 7
    x, gate, weight, rstd = ctx.saved_tensors
    dx, dgate, dweight = direct(gated_rms_norm_backward_op, dy, x, gate, weight, rstd, ctx.sigmoid, ctx.before)
    return dx, dgate, None if weight is None else dweight, None, None, None, None


gated_rms_norm_op.register_autograd(_gated_gradients, setup_context=_save_gated)
