"""Host code of RoPE: one launch for queries and keys, the same backward with the angle negated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.eager import direct
from archsearch_kernels.lasting import kept
from archsearch_kernels.rope.kernels import rope_rotate


def _frequency(half: int, theta: float, device: torch.device) -> Tensor:
    return theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)


def _frequency_of(x: Tensor, half: int, theta: float) -> Tensor:
    return kept(x.device, ("rope", half, theta), lambda: _frequency(half, theta, x.device))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0


def _rotate(
    q: Tensor, k: Tensor | None, position: int, positions: Tensor | None, theta: float, n_dims: int, back: bool
) -> list[Tensor]:
    given = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k) if x is not None]
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    B, T, _, D = q.shape
    half = n_dims // 2
    heads = [x.shape[2] for x in given] + [0]
    rope_rotate.launch(
        lambda c: (-(-B * T // c["BR"]) * sum(-(-h // c["BH"]) for h in heads),),
        {
            "q": given[0], "k": None if k is None else given[1],
            "out_q": out[0], "out_k": None if k is None else out[1],
            "frequency": _frequency_of(q, half, theta), "positions": positions,
            "rows": B * T, "T": T, "position": position,
            "start_stride": 0 if positions is None or positions.numel() == 1 else positions.stride(0),
            "q_batch": given[0].stride(0), "q_token": given[0].stride(1), "q_head": given[0].stride(2),
            "k_batch": given[-1].stride(0), "k_token": given[-1].stride(1), "k_head": given[-1].stride(2),
            "HQ": heads[0], "HK": 0 if k is None else heads[1], "D": D, "HALF": half, "BACK": back,
            "PAIR": _power_of_two(half), "REST": _power_of_two(D - n_dims),
        },
        sizes={"rows": B * T},
    )  # fmt: skip
    return out


@torch.library.custom_op(
    "archsearch::rope",
    mutates_args=(),
    schema="(Tensor x, int position, Tensor? positions, float theta, int n_dims, bool back) -> Tensor",
)
def rope_op(x: Tensor, position: int, positions: Tensor | None, theta: float, n_dims: int, back: bool) -> Tensor:
    return _rotate(x, None, position, positions, theta, n_dims, back)[0]


@torch.library.custom_op(
    "archsearch::rope_qk",
    mutates_args=(),
    schema="(Tensor q, Tensor k, int position, Tensor? positions, float theta, int n_dims, bool back)"
    " -> (Tensor, Tensor)",
)
def rope_qk_op(
    q: Tensor, k: Tensor, position: int, positions: Tensor | None, theta: float, n_dims: int, back: bool
) -> tuple[Tensor, Tensor]:
    out_q, out_k = _rotate(q, k, position, positions, theta, n_dims, back)
    return out_q, out_k


@rope_op.register_fake
def _(x: Tensor, position: int, positions: Tensor | None, theta: float, n_dims: int, back: bool) -> Tensor:
    return x.new_empty(x.shape)


@rope_qk_op.register_fake
def _(
    q: Tensor, k: Tensor, position: int, positions: Tensor | None, theta: float, n_dims: int, back: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, ctx.position, positions, ctx.theta, ctx.n_dims, ctx.back = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(positions)


def _options(ctx: Any) -> tuple[Any, ...]:
    return ctx.position, *ctx.saved_tensors, ctx.theta, ctx.n_dims, not ctx.back


def _gradient(ctx: Any, dx: Tensor | None) -> tuple[Any, ...]:
    return None if dx is None else direct(rope_op, dx, *_options(ctx)), None, None, None, None, None


def _gradients(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Any, ...]:
    if dq is not None and dk is not None:
        dq, dk = direct(rope_qk_op, dq, dk, *_options(ctx))
    else:
        dq, dk = (None if d is None else direct(rope_op, d, *_options(ctx)) for d in (dq, dk))
    return dq, dk, None, None, None, None, None


rope_op.register_autograd(_gradient, setup_context=_save)
rope_qk_op.register_autograd(_gradients, setup_context=_save)
