"""The selective scan of Mamba, h_t = e^{dt_t A} h_{t-1} + dt_t B_t x_t and y_t = C_t h_t (Gu and Dao, 2312.00752).

Every channel has a decay of its own for each of its N states, so there is no matrix product to be had from pairs of
tokens; what counts is to touch the [T, N, D] states only while they are in the processor's cache. The chunked form
computes everything that can be computed for a chunk at once, runs the recurrence itself with one multiply-add a
token, and keeps only the states between chunks: the backward pass computes the others again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE = 2**19  # numbers of one chunk's states: about what a core's share of the last-level cache holds


def selective_scan_step(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """One token: x, dt [B, D], a [D, N], b, c [B, N], state [B, N, D].

    Returns y [B, D] and the new state, which is `state` itself, written over, if `inplace`.
    """
    work, given = state.dtype, state
    dt_ = dt.to(work)
    decay = (dt_[:, None] * a.to(work).t()).exp()  # [B, N, D]
    write = b.to(work)[..., None] * (dt_ * x.to(work))[:, None]
    state = torch.addcmul(write, decay, state)
    with torch.autocast(x.device.type, enabled=False):
        y = (c.to(work)[:, None] @ state).squeeze(1)
    return y.to(x.dtype), given.copy_(state) if inplace else state


def selective_scan_recurrent(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The truth: one token after another. Shapes as in `selective_scan`."""
    state = _first_state(x, a, initial_state)
    rows = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(-1, 1, 1)
        y, state = selective_scan_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1), state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunked form for training and prefill, any T >= 1; needs memory for (T / chunk + 3 chunk) states.

    x [B, T, D]; dt [B, T, D] step sizes > 0; a [D, N] < 0; b, c [B, T, N]; initial_state [B, N, D]; `seq_idx` [B, T]
    numbers packed documents (the initial state belongs to the first); `chunk` in tokens, None: 8 to 64, by CACHE.
    Returns y [B, T, D] in x's dtype and the final state [B, N, D] in float32 (float64 for float64 x).
    """
    state = _first_state(x, a, initial_state)
    chunk = min(64, max(8, CACHE // state.numel())) if chunk is None else chunk
    keep = None
    if seq_idx is not None:
        keep = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0), value=True).t()[..., None, None].to(state.dtype)
    dt = dt.to(state.dtype)
    u = dt * x.to(state.dtype)
    u, dt, b, c = (z.to(state.dtype).transpose(0, 1).contiguous() for z in (u, dt, b, c))  # [T, B, ...]
    y, state = _Scan.apply(u, dt, a.to(state.dtype).t().contiguous(), b, c, state, keep, chunk)  # type: ignore[no-untyped-call]
    return y.transpose(0, 1).to(x.dtype), state


def _first_state(x: Tensor, a: Tensor, initial_state: Tensor | None) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.to(work)
    return x.new_zeros(x.shape[0], a.shape[1], x.shape[2], dtype=work)


class _Scan(torch.autograd.Function):
    """u, dt [T, B, D], a [N, D], b, c [T, B, N], state [B, N, D], keep [T, B, 1, 1] or None; y [T, B, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor,
        keep: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(u)
        found = []  # the state as each chunk finds it, for the backward pass if there will be one
        training = any(ctx.needs_input_grad)
        chunks = _Chunks(u, dt, a, b, keep, chunk)
        with torch.autocast(u.device.type, enabled=False):
            for now in chunks.slices:
                if training:
                    found.append(state)
                _, h = chunks.states(now, state)
                torch.matmul(c[now].unsqueeze(-2), h, out=y[now].unsqueeze(-2))
                state = h[-1].clone()
        if training:
            ctx.save_for_backward(u, dt, a, b, c, torch.stack(found), keep)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, a, b, c, found, keep = ctx.saved_tensors
        du, d_dt, db, dc = (torch.empty_like(z) for z in (u, dt, b, c))
        da = torch.zeros_like(a)
        over_n = a.new_ones(1, a.shape[0])  # a product with ones sums several times faster than sum()
        chunks = _Chunks(u, dt, a, b, keep, ctx.chunk)
        room, rows = chunks.room()
        with torch.autocast(u.device.type, enabled=False):
            for now, state in reversed(list(zip(chunks.slices, found.unbind(0), strict=True))):
                decay, h = chunks.states(now, state)
                dh = torch.mul(c[now].unsqueeze(-1), dy[now].unsqueeze(-2), out=room[: len(h)])  # [C, B, N, D]
                dh[-1] += d_state
                for t in reversed(range(len(h) - 1)):
                    rows[t].addcmul_(chunks.decay_rows[t + 1], rows[t + 1])
                d_state = decay[0] * dh[0]
                dc[now] = (dy[now].unsqueeze(-2) @ h.mT).squeeze(-2)
                db[now] = (u[now].unsqueeze(-2) @ dh.mT).squeeze(-2)
                du[now] = (b[now].unsqueeze(-2) @ dh).squeeze(-2)
                decay[0] *= state
                decay[1:] *= h[:-1]
                dh *= decay  # now the gradient of dt a
                d_dt[now] = (over_n @ torch.mul(dh, a, out=h)).squeeze(-2)
                dh *= dt[now].unsqueeze(-2)
                da += (a.new_ones(1, dh.shape[0] * dh.shape[1]) @ dh.view(-1, a.numel())).view_as(a)
        return du, d_dt, da, db, dc, d_state, None, None


class _Chunks:
    """Decays and states of one chunk after another, always in the same memory, which so stays in the cache."""

    def __init__(self, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, keep: Tensor | None, chunk: int) -> None:
        self.u, self.dt, self.a, self.b, self.keep = u, dt, a, b, keep
        self.slices = [slice(s, min(s + chunk, len(u))) for s in range(0, len(u), chunk)]
        self.shape = (min(chunk, len(u)), u.shape[1], *a.shape)  # [C, B, N, D]
        self.decay, self.decay_rows = self.room()
        self.h, self.h_rows = self.room()

    def room(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Memory for a chunk of states, and the same token by token."""
        made = self.a.new_empty(self.shape)
        return made, made.unbind(0)

    def states(self, now: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states [C, B, N, D] of a chunk that finds `state`."""
        C = now.stop - now.start
        decay = torch.mul(self.dt[now].unsqueeze(-2), self.a, out=self.decay[:C]).exp_()
        if self.keep is not None:
            decay *= self.keep[now]
        h = torch.mul(self.b[now].unsqueeze(-1), self.u[now].unsqueeze(-2), out=self.h[:C])
        for row, by in zip(self.h_rows[:C], self.decay_rows, strict=False):
            state = row.addcmul_(by, state)
        return decay, h
