"""Mixture of block attention (MoBA, 2502.13189): softmax over the query's own block and the best past blocks.

The sequence is cut into blocks of c tokens. A query scores every block wholly in its past by q . mean(keys of the
block), takes the top_k - 1 best, and attends to those and, causally, to its own block. Every query head chooses for
itself; the choice has no gradient. With top_k at least the number of blocks this is full attention.

A chosen block is a small dense problem: queries are sorted by the block they chose and cut into tiles, so that one
batched matrix product serves a tile, and a query's parts are merged by their softmax sums. Work: T (top_k c + T / c).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from archsearch_kernels.attention import attention

CPU_RUN = 2**17  # logits computed at once: what a core's cache holds (2^16 to 2^19 are within 10 % at T = 4096)
GPU_RUN = 2**26  # enough to fill the device


def block_sparse_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    per_group: bool = False,
) -> Tensor:
    """The truth: one query at a time over an explicit softmax. Shapes as in `block_sparse_attention`."""
    B, T, H, D = q.shape
    S, G, c = k.shape[1], k.shape[2], block_size
    scale = D**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))  # [B, S, H, D]
    out = v.new_empty(B, T, H, v.shape[3])
    for b in range(B):
        for t in range(S - T, S):
            start = 0 if seq_idx is None else int((seq_idx[b] < seq_idx[b, t]).sum())  # of the document
            query, keys = q[b, t - S + T].to(wide), k[b, start : t + 1].to(wide)  # [H, D], [S', H, D]
            n = (t - start) // c  # past blocks
            means = keys[: n * c].reshape(n, c, H, D).mean(1)
            scores = torch.einsum("hd,nhd->hn", query, means)
            if per_group:
                scores = scores.view(G, H // G, n).sum(1).repeat_interleave(H // G, dim=0)
            best = scores.topk(min(top_k - 1, n), dim=-1).indices
            chosen = (best[:, :, None] == torch.arange(n, device=q.device)).any(1)  # [H, n]
            seen = torch.ones(H, len(keys), dtype=torch.bool, device=q.device)
            seen[:, : n * c] = chosen.repeat_interleave(c, dim=1)
            logits = torch.einsum("hd,shd->hs", query, keys) * scale
            weights = logits.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
            out[b, t - S + T] = torch.einsum("hs,shv->hv", weights, v[b, start : t + 1])
    return out


def block_means(k: Tensor, block_size: int) -> Tensor:
    """Mean key, in float32 or wider, of each full block of k [B, S, G, D] that a token may look back on.

    Returns [B, N, G, D] with N = (S - 1) // block_size: the last token's own block is none of them, even when full.
    """
    B, S, G, D = k.shape
    n = (S - 1) // block_size
    blocks = k[:, : n * block_size].view(B, n, block_size, G, D)
    return blocks.mean(2, dtype=torch.promote_types(k.dtype, torch.float32)).detach()


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    means: Tensor | None = None,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    per_group: bool = False,
) -> Tensor:
    """Block-selected attention of the last T positions over S keys.

    q [B, T, H, D], k [B, S, G, D], v [B, S, G, V] with H a multiple of G and T <= S; top_k counts the own block; means
    [B, N, G, D] as block_means(k, block_size) gives them, None: computed here. `seq_idx` [B, T] only with T = S: every
    document has blocks of its own, counted from its first token. `per_group`: the query heads that share a key head
    choose together, by the sum of their scores, as in NSA's selected branch (2502.11089). Returns [B, T, H, V] in v's
    dtype.
    """
    T, S = q.shape[1], k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if top_k >= -(-S // block_size):
        return attention(q, k, v, scale=scale, seq_idx=seq_idx)
    if seq_idx is not None:
        return _by_document(q, k, v, block_size, top_k, scale, seq_idx, per_group)
    means = block_means(k, block_size) if means is None else means
    if T == 1:
        return _one_query(q, k, v, means, block_size, top_k, scale, per_group)
    first = (S - T) // block_size  # queries start inside this block: fill it up in front, and the last one behind
    front, behind = (S - T) % block_size, -S % block_size
    q = F.pad(q, (0, 0, 0, 0, front, behind))
    k, v = (F.pad(x, (0, 0, 0, 0, 0, behind)) for x in (k, v))
    own = torch.arange(first, first + q.shape[1] // block_size, device=q.device)
    past = torch.arange(means.shape[1], device=q.device) < own[:, None]  # [queries' blocks, blocks]
    out = _blocked(q, k, v, means, past[None], first, block_size, top_k, scale, per_group)
    return out[:, front : front + T]


def _best_blocks(
    q: Tensor, means: Tensor, past: Tensor, block_size: int, n_best: int, per_group: bool
) -> tuple[Tensor, Tensor]:
    """The n_best past blocks of each query and head, [B, H, T, n_best], and whether there was one to take."""
    B, T, H, D = q.shape
    G = means.shape[2]
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        grouped = q.to(means.dtype).view(B, T, G, H // G, D)
        if per_group:  # the sum of the heads' scores is the score of their sum
            grouped = grouped.sum(3, keepdim=True).expand_as(grouped)
        scores = torch.einsum("btgrd,bngd->bgrtn", grouped, means).flatten(1, 2)  # [B, H, T, N]
        seen = past.repeat_interleave(block_size, dim=1)[:, None]  # [1 or B, 1, T, N]
        best = scores.masked_fill(~seen, float("-inf")).topk(n_best, dim=-1)
    return best.indices, best.values != float("-inf")


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    past: Tensor,
    first: int,
    block_size: int,
    top_k: int,
    scale: float,
    per_group: bool,
) -> Tensor:
    """Whole blocks of queries, the first of them block `first` of the keys. past [1 or B, T / c, N]: may be chosen."""
    (B, T, H, D), G, c, device = q.shape, k.shape[2], block_size, q.device
    rows = (q * scale).transpose(1, 2).reshape(B * H * T, D)
    k_blocks, v_blocks = (x.transpose(1, 2).reshape(-1, c, x.shape[3]) for x in (k, v))  # [B G N, c, ...]
    n_keys, n_best = k.shape[1] // c, min(top_k - 1, means.shape[1])

    head = torch.arange(B * H, device=device)
    base = (head // H * G + head % H // (H // G)) * n_keys  # [B H]: first block of each head's keys
    own = (base[:, None] + torch.arange(first, first + T // c, device=device)).flatten()  # [B H T / c]
    chosen, exists = _best_blocks(q, means, past, c, n_best, per_group)
    group = torch.where(exists, head.view(B, H, 1, 1) * n_keys + chosen, B * H * n_keys)
    member, group, slot = _tiles(group.flatten(), B * H * n_keys, c)

    # the own blocks are tiles like the others, in front of them
    member = torch.cat([torch.arange(B * H * T, device=device).view(-1, c), member // max(n_best, 1)])
    block = torch.cat([own, base[group // n_keys] + group % n_keys])
    slot = torch.where(exists.flatten(), B * H * T + slot, -1).view(B * H * T, n_best)
    slot = torch.cat([torch.arange(B * H * T, device=device)[:, None], slot], dim=1)
    out = _TileAttention.apply(rows, k_blocks, v_blocks, member, block, slot, len(own))  # type: ignore[no-untyped-call]
    return out.view(B, H, T, -1).transpose(1, 2)


class _TileAttention(torch.autograd.Function):
    """Softmax over the union of a query's tiles, one cache-sized run of tiles after the other.

    q [R, D] (scaled), k [M, c, D], v [M, c, V]; member [N, c]: row of each query in a tile, block [N]: the tile's
    keys; slot [R, P]: where in the flattened tiles a row's parts are, -1 for none; the first n_near tiles are causal.
    The backward recomputes the weights from the log-sum of each row, as flash attention does (2205.14135).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, member: Tensor, block: Tensor, slot: Tensor, n_near: int
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out_tiles = q.new_empty(*member.shape, v.shape[2], dtype=wide)  # [N, c, V], not yet normalised
        sum_tiles, peak_tiles = (q.new_empty(*member.shape, 1, dtype=wide) for _ in range(2))
        with torch.autocast(q.device.type, enabled=False):
            for run, future in _runs(member, n_near):
                logits = (_rows(q, member[run]) @ _rows(k, block[run]).mT).to(wide)
                if future is not None:
                    logits.masked_fill_(future, float("-inf"))
                peak_tiles[run] = logits.amax(-1, keepdim=True)
                weights = logits.sub_(peak_tiles[run]).exp_()
                sum_tiles[run] = weights.sum(-1, keepdim=True)
                out_tiles[run] = weights.to(v.dtype) @ _rows(v, block[run])
        at = slot.clamp(min=0)
        out, total, peak = (_rows(x.flatten(0, 1), at) for x in (out_tiles, sum_tiles, peak_tiles))  # [R, P, ...]
        peak.masked_fill_(slot[..., None] < 0, float("-inf"))
        top = peak.amax(1)
        share = (peak - top[:, None]).exp_()
        norm = (share * total).sum(1)
        merged = ((share * out).sum(1) / norm).to(v.dtype)
        ctx.save_for_backward(q, k, v, member, block, slot, merged, top + norm.log())
        ctx.n_near = n_near
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, member, block, slot, out, log_sum = ctx.saved_tensors
        (N, c), wide = member.shape, log_sum.dtype
        delta = (grad.to(wide) * out).sum(-1, keepdim=True)
        # places that nobody takes weigh exp(-inf) = 0; slots of -1 mark the place past the end
        taken = torch.zeros(N * c + 1, dtype=torch.bool, device=q.device).index_fill_(
            0, slot.flatten() % (N * c + 1), 1
        )
        log_sum_tiles = _rows(log_sum, member).masked_fill_(~taken[:-1].view(N, c, 1), float("inf"))
        dq_tiles = q.new_empty(N, c, q.shape[1])
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        with torch.autocast(q.device.type, enabled=False):
            for run, future in _runs(member, ctx.n_near):
                rows, at = member[run], block[run]
                q_run, k_run, v_run, grad_run = _rows(q, rows), _rows(k, at), _rows(v, at), _rows(grad, rows)
                weights = (q_run @ k_run.mT).to(wide).sub_(log_sum_tiles[run]).exp_()
                if future is not None:
                    weights.masked_fill_(future, 0.0)
                dv.index_add_(0, at, (weights.to(v.dtype).mT @ grad_run).to(wide))
                d_logits = (grad_run @ v_run.mT).to(wide).sub_(_rows(delta, rows)).mul_(weights).to(q.dtype)
                dk.index_add_(0, at, (d_logits.mT @ q_run).to(wide))
                dq_tiles[run] = d_logits @ k_run
        dq = _rows(dq_tiles.flatten(0, 1), slot.clamp(min=0)).masked_fill_(slot[..., None] < 0, 0.0).sum(1)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """x[at] for x [R, ...] and any shape of `at`."""
    return x.index_select(0, at.flatten()).view(*at.shape, *x.shape[1:])


def _runs(member: Tensor, n_near: int) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices of the tiles that are computed at once, and the mask of the causal ones."""
    n, c = member.shape
    length = max(1, (CPU_RUN if member.device.type == "cpu" else GPU_RUN) // c**2)
    future = torch.ones(c, c, dtype=torch.bool, device=member.device).triu(1)
    for first, last, mask in ((0, n_near, future), (n_near, n, None)):
        for start in range(first, last, length):
            yield slice(start, min(start + length, last)), mask


def _tiles(group_of: Tensor, n_groups: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack the members of groups of any size into tiles of one size.

    group_of [members] in 0 .. n_groups, n_groups itself meaning none. Returns member [tiles, size]: who sits where;
    group [tiles]: whose members a tile holds; slot [members]: where each sits in the flattened tiles. Places that
    nobody takes, and the slot of members without a group, hold 0. As many tiles as could be needed are made, so that
    nothing waits for the device.
    """
    device, n_members = group_of.device, group_of.numel()
    n_tiles = -(-n_members // size) + n_groups  # each group wastes less than one
    sorted_group, order = group_of.sort(stable=True)
    count = torch.zeros(n_groups + 1, dtype=torch.long, device=device)
    count.scatter_add_(0, group_of, torch.ones_like(group_of))
    needed = (count + size - 1) // size
    needed[n_groups] = 0
    tiles_so_far, members_so_far = needed.cumsum(0), count.cumsum(0)
    rank = torch.arange(n_members, device=device) - (members_so_far - count)[sorted_group]
    spare = n_tiles * size  # one slot past the end for those without a group
    taken = torch.where(sorted_group < n_groups, (tiles_so_far - needed)[sorted_group] * size + rank, spare)
    member = torch.zeros(spare + 1, dtype=torch.long, device=device).scatter_(0, taken, order)[:spare]
    slot = torch.zeros_like(order).scatter_(0, order, taken % max(spare, 1))
    group = torch.searchsorted(tiles_so_far[:n_groups].contiguous(), torch.arange(n_tiles, device=device), right=True)
    return member.view(n_tiles, size), group.clamp_(max=n_groups - 1), slot


def _one_query(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, block_size: int, top_k: int, scale: float, per_group: bool
) -> Tensor:
    """Decode: gather the chosen blocks of each head beside its own."""
    (B, _, H, D), G, N, c = q.shape, k.shape[2], means.shape[1], block_size
    wide = torch.promote_types(q.dtype, torch.float32)
    past = torch.ones(1, 1, N, dtype=torch.bool, device=q.device)
    chosen = _best_blocks(q, means, past, 1, top_k - 1, per_group)[0][:, :, 0]  # [B, H, n_best]
    row = torch.arange(B, device=q.device).view(B, 1, 1)
    kv_head = (torch.arange(H, device=q.device) // (H // G)).view(1, H, 1)
    far_k, far_v = (
        x[:, : N * c].view(B, N, c, G, -1)[row, chosen, :, kv_head].flatten(2, 3)  # [B, H, n_best c, D]
        for x in (k, v)
    )
    near_k, near_v = (x[:, N * c :].transpose(1, 2) for x in (k, v))  # [B, G, own, D]
    query = q.reshape(B, H, 1, D)
    far = (query @ far_k.mT)[:, :, 0]
    near = (query.view(B, G, H // G, D) @ near_k.mT).flatten(1, 2)
    weights = (torch.cat([far, near], -1).to(wide) * scale).softmax(-1).to(v.dtype)  # [B, H, n_best c + own]
    far_weights, near_weights = weights[..., : far.shape[-1]], weights[..., far.shape[-1] :]
    far = (far_weights[:, :, None] @ far_v)[:, :, 0]
    near = (near_weights.reshape(B, G, H // G, -1) @ near_v).flatten(1, 2)
    return (far + near)[:, None]


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int, scale: float, seq_idx: Tensor, per_group: bool
) -> Tensor:
    """Move every document to the next block boundary, attend there among blocks of one document, and move back.

    How much room the gaps take is read from the device: once a call, in packed training only.
    """
    B, T = seq_idx.shape
    c, at = block_size, torch.arange(T, device=q.device)
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=False)  # [B, T], the first document apart
    start = torch.where(starts, at, 0).cummax(1).values
    length = F.pad(start[:, 1:] - start[:, :-1], (1, 0))  # of the document before, where a new one starts
    moved = at + (-length % c).cumsum(1)  # [B, T]: gaps so far
    n = int(moved.max()) // c + 1
    to = moved[..., None, None]
    q, k, v = (x.new_zeros(B, n * c, *x.shape[2:]).scatter(1, to.expand_as(x), x) for x in (q, k, v))
    document = seq_idx.new_full((B, n * c), -1).scatter(1, moved, seq_idx)[:, ::c]  # [B, n]: a block has only one
    earlier = torch.arange(n, device=q.device)[:, None] > torch.arange(n - 1, device=q.device)
    past = earlier & (document[:, :, None] == document[:, None, :-1])  # [B, n, n - 1]
    out = _blocked(q, k, v, block_means(k, c), past, 0, c, top_k, scale, per_group)
    return out.gather(1, to.expand(-1, -1, *out.shape[2:]))
