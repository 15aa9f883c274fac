"""Sizes of what the kernels of block-selected attention pass on, from shapes alone, and tensors as they take them."""

from __future__ import annotations

from torch import Tensor

from archsearch_kernels.block_sparse_attention.kernels.readers import CHUNK


def roles(H: int, G: int, per_group: bool) -> tuple[int, int, int]:
    """How many select, query heads under each selector, and selectors to one head of the keys."""
    return (G, H // G, 1) if per_group else (H, 1, H // G)


def n_blocks(S: int, block_size: int, windows: Tensor | None) -> int:
    """Blocks that the kernels number."""
    return -(-S // block_size) if windows is None else windows.shape[1]


def table_sizes(
    B: int, T: int, S: int, H: int, G: int, block_size: int, top_k: int, per_group: bool, NB: int
) -> tuple[int, int]:
    """How many pairs there are (with documents: at most), and how many counts lead to them: from the shapes alone."""
    selectors, _, per_keys = roles(H, G, per_group)
    taken = T * top_k
    for own in range(min(top_k - 1, -(-S // block_size))):  # a token of block `own` has that many past ones
        tokens = min(S, (own + 1) * block_size) - max(S - T, own * block_size)
        taken -= max(0, tokens) * (top_k - 1 - own)
    return B * selectors * taken, B * G * NB * -(-T // CHUNK) * per_keys


def padded(width: int) -> int:
    """The next power of two, 16 at least: what a tensor core's product takes."""
    return max(16, 1 << (width - 1).bit_length())


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Steps of [B, T, H, :] in elements."""
    return {f"{name}_b": x.stride(0), f"{name}_t": x.stride(1), f"{name}_h": x.stride(2)}


def rows_in_order(x: Tensor) -> Tensor:
    """x itself where the elements of a row lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
