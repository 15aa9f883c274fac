"""Causal attention in three launches: forward, gradient of the queries, gradient of keys and values."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.attention.kernels.backward import attention_dkdv, attention_dq, attention_dsink
from archsearch_kernels.attention.kernels.forward import attention_forward
from archsearch_kernels.eager import direct

LOG2E = 1.4426950408889634
SHARED_BY_SECTION = 24 << 20  # bytes of keys and values that programs running together may read: half of an L2 cache


def attention_parallel(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, docs: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and log-sum-exp [B, H, T] in float32. Arguments as `attention`'s, already checked."""
    return direct(_attention, q, k, v, sink, docs, window, scale)


@torch.library.custom_op(
    "archsearch::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? docs, int? window, float scale) -> (Tensor, Tensor)",
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, docs: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = rows_in_order(q), rows_in_order(k), rows_in_order(v)
    docs = None if docs is None else rows_in_order(docs)
    (B, T, H, D), S, (G, V) = q.shape, k.shape[1], v.shape[2:]
    o = torch.empty((B, T, H, V), dtype=v.dtype, device=v.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=v.device)
    arguments: dict[str, Any] = {
        "q": q, "k": k, "v": v, "sink": sink, "docs": docs, "o": o, "lse": lse,
        "T": T, "S": S, "H": H, "n_heads": B * H, "section": _section(k, v) * (H // G),
        "window": window or 0, "scale2": scale * LOG2E,
        **strides("q", q), **strides("k", k), **strides("v", v), "docs_b": 0 if docs is None else docs.stride(0),
        "GROUP": H // G, **widths(D, V), **_flags(q, docs, window), "HAS_SINK": sink is not None,
    }  # fmt: skip
    attention_forward.launch(lambda c: (_cdiv(T, c["BM"]) * B * H,), arguments, sizes=_sizes(q, k, window))
    return o, lse


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, docs: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return v.new_empty((B, T, H, v.shape[3])), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op(
    "archsearch::attention_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? docs, Tensor o, Tensor lse, "
    "int? window, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, docs: Tensor | None,
    o: Tensor, lse: Tensor, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, do = rows_in_order(q), rows_in_order(k), rows_in_order(v), rows_in_order(do)
    docs = None if docs is None else rows_in_order(docs)
    (B, T, H, D), S, (G, V) = q.shape, k.shape[1], v.shape[2:]
    parts = _parts(B * G * _cdiv(S, 128), H // G, processors(q.device))
    delta = torch.empty_like(lse)
    dq = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    summed = torch.float32 if parts > 1 else k.dtype
    dk = torch.empty((B, S, G, parts, D), dtype=summed, device=q.device)
    dv = torch.empty((B, S, G, parts, V), dtype=summed, device=q.device)
    shared: dict[str, Any] = {
        "q": q, "k": k, "v": v, "docs": docs, "lse": lse, "do": do, "delta": delta,
        "T": T, "S": S, "H": H, "window": window or 0, "scale": scale, "scale2": scale * LOG2E,
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("do", do),
        "docs_b": 0 if docs is None else docs.stride(0), "GROUP": H // G, **widths(D, V), **_flags(q, docs, window),
    }  # fmt: skip
    sizes = _sizes(q, k, window)
    section = _section(k, v)
    attention_dq.launch(
        lambda c: (_cdiv(T, c["BM"]) * B * H,),
        {
            **shared, "o": o, "dlse": None if dlse is None else dlse.contiguous(), "dq": dq,
            "n_heads": B * H, "section": section * (H // G), "HAS_DLSE": dlse is not None,
        },
        sizes=sizes,
    )  # fmt: skip
    attention_dkdv.launch(
        lambda c: (_cdiv(S, c["BN"]) * B * G * parts,),
        {**shared, "dk": dk, "dv": dv, "n_heads": B * G * parts, "section": section * parts, "PARTS": parts},
        sizes=sizes,
    )
    if parts > 1:
        dk, dv = dk.sum(3).to(k.dtype), dv.sum(3).to(v.dtype)
    else:
        dk, dv = dk.view(B, S, G, D), dv.view(B, S, G, V)
    dsink = torch.empty(0 if sink is None else H, dtype=torch.float32, device=q.device)
    if sink is not None:
        attention_dsink.launch(
            lambda c: (H,),
            {"sink": sink, "lse": lse, "delta": delta, "dsink": dsink, "B": B, "T": T, "H": H},
            sizes={"T": T},
        )
    return dq, dk, dv, dsink


@_backward.register_fake
def _(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, docs: Tensor | None,
    o: Tensor, lse: Tensor, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsink = q.new_empty((0 if sink is None else q.shape[2],), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink, docs, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, sink, docs, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, sink, docs, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv, dsink = direct(_backward, do, dlse, q, k, v, sink, docs, o, lse, ctx.window, ctx.scale)
    return dq, dk, dv, None if sink is None else dsink.to(sink.dtype), None, None, None


_attention.register_autograd(_gradients, setup_context=_setup)


def rows_in_order(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Of batch, position and head."""
    return {f"{name}_b": x.stride(0), f"{name}_t": x.stride(1), f"{name}_h": x.stride(2)}


def widths(D: int, V: int) -> dict[str, int]:
    """Head widths, and the powers of two that hold them."""
    return {"D": D, "V": V, "BD": max(16, 1 << (D - 1).bit_length()), "BV": max(16, 1 << (V - 1).bit_length())}


def precision(x: Tensor) -> str:
    """How products are taken: float32 off the tensor cores, 16-bit numbers ignore it.

    On Hopper three tf32 products would take operands from registers, where ptxas up to 13.0 gives wrong numbers.
    """
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _flags(q: Tensor, docs: Tensor | None, window: int | None) -> dict[str, Any]:
    return {"HAS_WINDOW": window is not None, "HAS_DOCS": docs is not None, "PRECISION": precision(q)}


def _sizes(q: Tensor, k: Tensor, window: int | None) -> dict[str, int]:
    return {"T": q.shape[1], "S": k.shape[1], "BH": q.shape[0] * q.shape[2], "W": window or 0}


def _section(k: Tensor, v: Tensor) -> int:
    """Key heads whose keys and values stay in the L2 cache while all their queries pass."""
    one = k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
    return max(1, min(k.shape[0] * k.shape[2], SHARED_BY_SECTION // one))


def _parts(programs: int, group: int, wanted: int) -> int:
    """In how many parts the query heads of a group go, so that few key heads keep every processor busy."""
    parts = 1
    while programs * parts < wanted and parts < group and group % (2 * parts) == 0:
        parts *= 2
    return parts


@cache
def processors(device: torch.device) -> int:
    """Of the GPU; elsewhere, for tests, as many as an H100 has."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
