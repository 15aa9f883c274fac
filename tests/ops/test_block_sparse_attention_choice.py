"""Which blocks the kernels of block-selected attention choose: against torch's attention under a mask, and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_sparse_inputs import inputs, kernel
from kernel_checks import TOLERANCE, assert_same, error, poisoned, randn
from torch import Tensor

from archsearch_kernels.block_sparse_attention import block_means, reference, selection


def under_a_mask(q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int, per_group: bool = False) -> Tensor:
    """Torch's attention over the blocks that a stable sort of the scores puts first."""
    (B, T, H, D), G = q.shape, k.shape[2]
    n = -(-T // block_size)
    means = F.pad(k, (0, 0, 0, 0, 0, -T % block_size)).view(B, n, block_size, G, D).mean(2)
    means = means.repeat_interleave(H // G, dim=2)
    scores = torch.einsum("bthd,bnhd->bhtn", q, means)
    if per_group:
        scores = scores.view(B, G, H // G, T, n).sum(2).repeat_interleave(H // G, dim=1)
    own = torch.arange(T, device=q.device) // block_size
    block = torch.arange(n, device=q.device)
    scores = scores.masked_fill(block >= own[:, None], float("-inf"))
    rank = scores.argsort(stable=True, dim=-1, descending=True).argsort(dim=-1)
    chosen = ((rank < top_k - 1) & (block < own[:, None])) | (block == own[:, None])  # [B, H, T, n]
    seen = chosen.repeat_interleave(block_size, dim=-1)[..., :T].tril()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("per_group", [False, True])
def test_torch_attention_under_a_mask(per_group: bool) -> None:
    given = inputs(100, B=1, H=4, G=2, top_k=4, per_group=per_group)
    assert_same(kernel, under_a_mask, given)


def test_every_block_is_full_attention() -> None:
    given = inputs(40, B=1, top_k=3)
    assert error(kernel(**given), under_a_mask(**given)) < TOLERANCE[torch.float32]


def test_equal_scores_go_to_the_lower_block() -> None:
    """Whole-numbered keys: exact scores, most of them equal."""
    given = inputs(200, B=1, H=2, top_k=5)
    given |= {"q": given["q"].sign(), "k": given["k"].mul(0.25).round().repeat_interleave(16, dim=1)[:, :200]}
    assert_same(kernel, under_a_mask, given)
    given["k"] = torch.zeros_like(given["k"])
    assert_same(lambda v: kernel(**{**given, "v": v}), lambda v: under_a_mask(**_wide(given, v)), {"v": given["v"]})


def _wide(given: dict[str, Any], v: Tensor) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) else x for n, x in {**given, "v": v}.items()}


def test_scores_without_bounds_still_choose_that_many() -> None:
    """Infinite, undefined and vanishing scores: every query gets its number of blocks, the table is full."""
    q, k = randn(1, 150, 2, 16), randn(1, 150, 2, 16, seed=1)
    means = reference.block_means(k, 16)
    means[:, 1] = float("nan")
    means[:, 2] = float("inf")
    means[:, 3] = -float("inf")
    means[:, 4:] *= 1e-40
    with poisoned():
        pairs, ends = selection.choose(q, k, means, 16, 3, False)
    assert ends[-1] == len(pairs)
    token, j = pairs >> 12, pairs & 63
    assert (token.min(), token.max(), j.max()) == (0, 149, 2)
    assert torch.equal(torch.bincount(token), 2 * (torch.arange(150, device=q.device) // 16 + 1).clamp(max=3))


def test_blocks_that_everybody_reads() -> None:
    """All 256 tokens of a chunk read the same blocks: counters that share an integer do not run into each other."""
    q, k = randn(1, 520, 1, 16), randn(1, 520, 1, 16, scale=0.0)
    pairs, ends = selection.choose(q, k, reference.block_means(k, 16), 16, 3, False)
    blocks = [[n for n in (0, 1) if n < t // 16] + [t // 16] for t in range(520)]
    readers = [[t << 12 | blocks[t].index(n) for t in range(520) if n in blocks[t]] for n in range(33)]
    assert pairs.tolist() == [entry for entries in readers for entry in entries]
    assert ends.view(33, -1)[:, -1].diff().tolist() == [len(entries) for entries in readers[1:]]


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_choose_as_float64(dtype: torch.dtype, per_group: bool) -> None:
    """Means, and sums of heads, are multiplied in two parts of 16 bits; with the large ones alone some would differ."""
    q, k = randn(1, 600, 4, 16, dtype=dtype), 1 + randn(1, 600, 2, 16, seed=1, dtype=dtype)
    means = reference.block_means(k, 16)
    _, ends = selection.choose(q, k, means, 16, 4, per_group)
    found = torch.diff(ends, prepend=ends.new_zeros(1)).view(2, 38, -1).sum(-1)[:, :37]  # readers of each block
    rows = q.double().view(600, 2, 2, 16)
    rows = rows.sum(2, keepdim=True) if per_group else rows
    own, block = torch.arange(600, device=q.device) // 16, torch.arange(37, device=q.device)

    def apart(rows: Tensor, means: Tensor) -> int:
        scores = torch.einsum("tgrd,ngd->gtrn", rows.double(), means[0].double())
        scores.masked_fill_((block >= own[:, None])[:, None], float("-inf"))
        best = scores.topk(3, dim=-1)
        chosen = torch.where(best.values > float("-inf"), best.indices, 37).flatten(1)
        counts = torch.zeros(2, 38, dtype=torch.long, device=q.device).scatter_add_(1, chosen, torch.ones_like(chosen))
        return int((counts[:, :37] + 16 * rows.shape[2] - found).abs().sum())

    large = (rows.bfloat16(), means.bfloat16()) if per_group else (rows, means.to(dtype))
    assert apart(rows, means) <= 2 < apart(*large)


@pytest.mark.parametrize("S", [16, 17, 100])
def test_means(S: int) -> None:
    k = randn(2, S, 2, 24)
    got = block_means(k, 16, implementation="triton")
    assert got.shape == (2, (S - 1) // 16, 2, 24)
    torch.testing.assert_close(got, reference.block_means(k, 16))
    assert not block_means(k.requires_grad_(), 16, implementation="triton").requires_grad


@torch.no_grad()
def test_means_at_hand_decide() -> None:
    given = inputs(40, S=100, B=1, top_k=3)
    means = reference.block_means(given["k"], 16)
    given["means"] = means
    torch.testing.assert_close(kernel(**given), kernel(**{**given, "means": None}))
    given["means"] = -means
    assert error(kernel(**given), reference.block_sparse_attention(**given)) < TOLERANCE[torch.float32]
