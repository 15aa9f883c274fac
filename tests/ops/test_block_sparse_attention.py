"""Block-selected attention against its one-query-at-a-time truth: outputs, gradients, documents, decode, cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archsearch_kernels.attention import attention
from archsearch_kernels.block_sparse_attention import (
    block_means,
    block_sparse_attention,
    block_sparse_attention_recurrent,
)

CASES: dict[str, dict[str, Any]] = {
    "plain": {"block_size": 8, "top_k": 3},
    "gqa": {"block_size": 8, "top_k": 2, "kv_heads": 2},
    "mqa, odd blocks": {"block_size": 7, "top_k": 4, "kv_heads": 1},
    "own block only": {"block_size": 8, "top_k": 1},
    "every block": {"block_size": 8, "top_k": 1000},
    "all but one block": {"block_size": 16, "top_k": 6},
    "one-token blocks": {"block_size": 1, "top_k": 5},
    "narrow values": {"block_size": 8, "top_k": 3, "value_dim": 4},
    "documents": {"block_size": 8, "top_k": 3, "documents": True},
    "documents, gqa": {"block_size": 5, "top_k": 2, "documents": True, "kv_heads": 2},
    "scale": {"block_size": 8, "top_k": 3, "scale": 0.7},
}


def inputs(
    T: int,
    S: int | None = None,
    kv_heads: int = 4,
    value_dim: int = 8,
    documents: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    S, B, H, D = S or T, 2, 4, 8
    torch.manual_seed(T)
    tensors = {
        "q": torch.randn(B, T, H, D, dtype=dtype),
        "k": torch.randn(B, S, kv_heads, D, dtype=dtype),
        "v": torch.randn(B, S, kv_heads, value_dim, dtype=dtype),
    }
    if documents:
        options["seq_idx"] = (torch.rand(B, T) < 0.05).long().cumsum(1)
    return {name: x.requires_grad_() for name, x in tensors.items()}, options


def output_and_gradients(form: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    out = form(**tensors, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), list(tensors.values()))]


def assert_is_the_truth(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    fast = output_and_gradients(block_sparse_attention, tensors, options)
    truth = output_and_gradients(block_sparse_attention_recurrent, tensors, options)
    for ours, expected in zip(fast, truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [1, 63, 100])
@pytest.mark.parametrize("case", CASES)
def test_training_form_is_the_truth(case: str, T: int) -> None:
    assert_is_the_truth(*inputs(T, **CASES[case]))


@pytest.mark.parametrize("T", [1, 2, 20, 60])
@pytest.mark.parametrize("case", [name for name in CASES if "documents" not in name])
def test_last_queries_of_a_longer_sequence(case: str, T: int) -> None:
    assert_is_the_truth(*inputs(T, S=67, **CASES[case]))


def test_long_sequence_in_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """257 tokens fill more tiles than one run holds, once a run is made small."""
    tensors, options = inputs(257, block_size=16, top_k=3)
    whole = output_and_gradients(block_sparse_attention, tensors, options)
    monkeypatch.setattr("archsearch_kernels.block_sparse_attention.reference.CPU_RUN", 16 * 16 * 3)
    for ours, expected in zip(output_and_gradients(block_sparse_attention, tensors, options), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 40])
@torch.no_grad()
def test_means_at_hand_change_nothing(T: int) -> None:
    tensors, options = inputs(T, S=67, block_size=8, top_k=3)
    means = block_means(tensors["k"], 8)
    assert means.shape == (2, 8, 4, 8)
    given = block_sparse_attention(**tensors, **options, means=means)
    torch.testing.assert_close(given, block_sparse_attention(**tensors, **options), rtol=0, atol=0)
    elsewhere = block_sparse_attention(**tensors, **options, means=-means)
    assert not torch.allclose(elsewhere, given)


@pytest.mark.parametrize("S", [1, 7, 8, 9, 16, 17])
def test_the_block_of_the_last_token_has_no_mean(S: int) -> None:
    k = torch.randn(1, S, 2, 4)
    means = block_means(k, 8)
    assert means.shape[1] == (S - 1) // 8
    for n in range(means.shape[1]):
        torch.testing.assert_close(means[:, n], k[:, 8 * n : 8 * n + 8].mean(1))
    assert block_means(k.bfloat16(), 8).dtype == torch.float32


@torch.no_grad()
def test_enough_blocks_are_full_attention() -> None:
    tensors, _ = inputs(63)
    full = attention(**tensors)
    for top_k in (8, 9):
        torch.testing.assert_close(block_sparse_attention(**tensors, block_size=8, top_k=top_k), full)
    assert not torch.allclose(block_sparse_attention(**tensors, block_size=8, top_k=7), full)


@torch.no_grad()
def test_a_planted_block_is_found() -> None:
    """One past block holds the queries' direction: with one choice they all take it, and nothing else."""
    T, planted = 64, 2
    q = torch.zeros(1, T, 1, 4)
    q[..., 0] = 1.0
    k = torch.zeros(1, T, 1, 4)
    k[:, 8 * planted : 8 * planted + 8, :, 0] = 30.0
    v = torch.zeros(1, T, 1, 1)
    v[:, 8 * planted : 8 * planted + 8] = 1.0
    found = block_sparse_attention(q, k, v, block_size=8, top_k=2)[0, :, 0, 0]
    torch.testing.assert_close(found[8 * planted :], torch.ones(T - 8 * planted), rtol=0, atol=1e-4)
    assert found[: 8 * planted].abs().max() == 0


@torch.no_grad()
def test_the_future_is_never_read() -> None:
    tensors, options = inputs(67, dtype=torch.float32, block_size=8, top_k=3)
    before = block_sparse_attention(**tensors, **options)
    for t in (0, 6, 7, 8, 40, 65):
        changed = {name: x.clone() for name, x in tensors.items()}
        for x in changed.values():
            x[:, t + 1 :] = 100.0
        torch.testing.assert_close(block_sparse_attention(**changed, **options)[:, : t + 1], before[:, : t + 1])


@torch.no_grad()
def test_what_is_not_chosen_is_not_read() -> None:
    """Decode gathers top_k blocks: a past block of NaN values far from the query leaves no trace."""
    tensors, options = inputs(1, S=67, dtype=torch.float32, block_size=8, top_k=2)
    q, k, v = tensors["q"], tensors["k"].clone(), tensors["v"].clone()
    k[:, 16:24] = 10 * q  # the block everybody wants
    expected = block_sparse_attention(q, k, v, **options)
    v[:, :16] = torch.nan
    torch.testing.assert_close(block_sparse_attention(q, k, v, **options), expected)


def test_bfloat16_is_near_float32() -> None:
    """Compared over the same choice of blocks: near ties may fall differently after rounding."""
    tensors, options = inputs(100, dtype=torch.float32, block_size=8, top_k=3)
    rounded = {name: x.detach().bfloat16().requires_grad_() for name, x in tensors.items()}
    exact = {name: x.detach().float().requires_grad_() for name, x in rounded.items()}
    low = output_and_gradients(block_sparse_attention, rounded, options)
    high = output_and_gradients(block_sparse_attention, exact, options)
    for ours, expected in zip(low, high, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_work_grows_with_the_budget_not_with_the_square() -> None:
    """Four times the tokens at one budget: about four times the products, where full attention has sixteen."""
    products = []
    for T in (512, 2048):
        q, k, v = (torch.randn(1, T, 1, 16) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            block_sparse_attention(q, k, v, block_size=32, top_k=3, implementation="reference")
        products.append(counter.get_total_flops() - 2 * 16 * T * (T // 32 - 1))  # less the scores of the means
    assert 0 < products[1] < 4.5 * products[0]
