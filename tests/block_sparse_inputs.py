"""What the kernel tests of block-selected attention share: shapes, inputs, packed documents, what may spill."""

from __future__ import annotations

from typing import Any

import torch
from kernel_checks import ON_GPU, assert_fits_hopper, randn
from torch import Tensor

from archsearch_kernels.block_sparse_attention import block_sparse_attention

SHAPES: dict[str, dict[str, Any]] = {
    "one token of two blocks": {"T": 1, "S": 20, "top_k": 1},
    "own block only": {"T": 63, "top_k": 1},
    "gqa": {"T": 100, "H": 4, "G": 2, "top_k": 3},
    "groups choose": {"T": 100, "H": 4, "G": 2, "top_k": 3, "per_group": True},
    "odd widths and groups of three": {"T": 65, "H": 3, "G": 1, "D": 24, "V": 40, "top_k": 3, "per_group": True},
    "chunked prefill": {"T": 40, "S": 150, "B": 1, "top_k": 4},
    "several chunks of tokens": {"T": 300, "B": 1, "H": 1, "block_size": 64, "top_k": 2},
    "large blocks": {"T": 300, "B": 1, "H": 1, "block_size": 128, "top_k": 2},
    "large blocks, gqa": {"T": 20, "S": 300, "B": 1, "H": 4, "G": 2, "block_size": 128, "top_k": 2},
    "two words of blocks": {"T": 9, "S": 600, "B": 1, "top_k": 6},
    "scale": {"T": 50, "top_k": 2, "scale": 0.7},
}


def inputs(
    T: int, S: int | None = None, B: int = 2, H: int = 2, G: int | None = None, D: int = 16, V: int | None = None,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    S, G = S or T, G or H
    return {
        "q": randn(B, T, H, D, seed=1, dtype=dtype),
        "k": randn(B, S, G, D, seed=2, dtype=dtype),
        "v": randn(B, S, G, V or D, seed=3, dtype=dtype),
        "block_size": 16,
        **options,
    }


def kernel(**given: Any) -> Tensor:
    return block_sparse_attention(**given, implementation="triton")


def rows_of(T: int, *lengths: int) -> Tensor:
    """Document numbers [2, T]: the lengths over and over, and in the second row from the last to the first."""
    rows = []
    for order in (lengths, lengths[::-1]):
        of_each = torch.tensor(order * -(-T // sum(order)))
        rows.append(torch.repeat_interleave(torch.arange(len(of_each)), of_each)[:T])
    return torch.stack(rows).to(randn(1).device)


def check_spills(launches: Any) -> None:
    # ptxas 13.1 moves descriptors out of the loops of the gradients and spills for it; 12.9 does not
    assert_fits_hopper(launches, spills=48)


def on_gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test
