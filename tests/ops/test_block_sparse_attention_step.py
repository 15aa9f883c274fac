"""One query of block-selected attention over a cache, by its kernels."""

from __future__ import annotations

import pytest
import torch
from block_sparse_inputs import inputs, kernel, on_gpu
from kernel_checks import TOLERANCE, error, poisoned
from torch import Tensor

from archsearch_kernels.block_sparse_attention import reference, step


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize(("block_size", "top_k", "B"), [(16, 4, 2), (32, 2, 2), (16, 7, 1), (64, 2, 0)])
@torch.no_grad()
def test_step_is_the_last_query(
    monkeypatch: pytest.MonkeyPatch, per_group: bool, block_size: int, top_k: int, B: int
) -> None:
    """With several programs a query and with one (B = 0); keys and values in a larger cache, means at hand."""
    if B == 0:
        monkeypatch.setattr(step, "PROGRAMS", B := 1)
    given = inputs(1, S=135, B=B, H=4, G=2, D=24, V=40, block_size=block_size, top_k=top_k, per_group=per_group)
    expected = reference.block_sparse_attention(**given)
    for name in ("k", "v"):
        x = given[name]
        cache = torch.full((B, 160, *x.shape[2:]), float("nan"), device=x.device)
        cache[:, :135] = x
        given[name] = cache[:, :135]
    means = torch.full((B, 99, 2, 24), float("nan"), device=given["q"].device)
    means[:, : 134 // block_size] = reference.block_means(given["k"], block_size)
    with poisoned():
        got = kernel(**given, means=means[:, : 134 // block_size])
    assert error(got, expected) < TOLERANCE[torch.float32]
    assert error(kernel(**given), expected) < TOLERANCE[torch.float32]


def test_what_is_not_chosen_is_not_read() -> None:
    given = inputs(1, S=67, H=2, top_k=2)
    given["k"][:, 16:32] = 10 * given["q"]  # the block everybody wants
    expected = kernel(**given)
    given["v"][:, :16] = torch.nan
    torch.testing.assert_close(kernel(**given), expected, rtol=0, atol=0)


@on_gpu
@torch.no_grad()
def test_step_of_a_long_cache() -> None:
    for per_group, H, G in ((False, 16, 16), (True, 64, 4)):
        given = inputs(1, S=32768, H=H, G=G, D=128, block_size=64, top_k=16, per_group=per_group, dtype=torch.bfloat16)
        given["means"] = reference.block_means(given["k"], 64)
        single = {n: x.float() if isinstance(x, Tensor) else x for n, x in given.items()}
        assert error(kernel(**given), reference.block_sparse_attention(**single)) < 1.5e-2
