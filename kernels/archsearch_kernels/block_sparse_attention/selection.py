"""Which blocks each query reads, and who reads each block: mean keys, the choice, the lists of readers."""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch_kernels.block_sparse_attention.kernels.readers import CHUNK, block_count, block_list
from archsearch_kernels.block_sparse_attention.kernels.selection import block_mean_keys, block_select, block_split
from archsearch_kernels.block_sparse_attention.shapes import (
    n_blocks,
    padded,
    roles,
    rows_in_order,
    strides,
    table_sizes,
)

FEWEST_COLUMNS = 128  # of scores; for fewer blocks there is one launch


@torch.library.custom_op("archsearch::block_means", mutates_args=(), schema="(Tensor k, int block_size) -> Tensor")
def block_means(k: Tensor, block_size: int) -> Tensor:
    """Mean keys [B, N, G, D] in float32 of the full blocks of k [B, S, G, D] behind its last token."""
    return mean_keys(k, None, block_size)


@block_means.register_fake
def _(k: Tensor, block_size: int) -> Tensor:
    B, S, G, D = k.shape
    return k.new_empty((B, (S - 1) // block_size, G, D), dtype=torch.float32)


def mean_keys(k: Tensor, windows: Tensor | None, block_size: int) -> Tensor:
    """Means of the first N blocks, or windows: there are at most N full ones behind the last token."""
    k = rows_in_order(k)
    B, S, G, D = k.shape
    N = (S - 1) // block_size
    means = torch.empty((B, N, G, D), dtype=torch.float32, device=k.device)
    if N == 0:
        return means
    block_mean_keys.launch(
        lambda c: (N, B * G),
        {
            "k": k, "means": means, "windows": windows, "N": N, "NB": n_blocks(S, block_size, windows), "S": S, "G": G,
            **strides("k", k), "C": block_size, "D": D, "BD": padded(D),
        },
        sizes={"T": S},
    )  # fmt: skip
    return means


def choose(
    q: Tensor, k: Tensor, means: Tensor, block_size: int, top_k: int, per_group: bool,
    tokens: Tensor | None = None, windows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chosen (entity, block) pairs in the order of their blocks, and the running sums that divide them up."""
    (B, T, H, D), S, G = q.shape, k.shape[1], k.shape[2]
    selectors, R, per_keys = roles(H, G, per_group)
    NB = n_blocks(S, block_size, windows)
    words, chunks = -(-NB // 32), -(-T // CHUNK)
    n_pairs, n_counts = table_sizes(B, T, S, H, G, block_size, top_k, per_group, NB)
    bits = torch.empty((B, selectors, words, T), dtype=torch.int32, device=q.device)
    counts = torch.empty(n_counts, dtype=torch.int32, device=q.device)
    pairs = torch.empty(n_pairs, dtype=torch.int32, device=q.device)
    shared = {"T": T, "SELECTORS": selectors, "PER_KEYS": per_keys, "WORDS": words}
    sizes = {"T": T, "HEADS": B * selectors}
    if q.dtype == torch.float32:
        products, rows, columns = 1, q[None], means[None]
    elif R == 1:
        products, rows, columns = 2, q[None], split(means, 1, q.dtype)
    else:  # in bfloat16: a sum of heads may be beyond float16
        products, rows, columns = 3, split(q, R, torch.bfloat16), split(means, 1, torch.bfloat16)
    for first, last, n_columns in token_ranges(T, S, block_size):
        block_select.launch(
            lambda c, n=last - first: (-(-n // c["BT"]), B * selectors),  # type: ignore[misc]
            {
                "rows": rows, "means": columns, "bits": bits, "tokens": tokens, "FROM": first, "TO": last, **shared,
                "S": S, "top_k": top_k, **dict(zip(("x_p", "x_b", "x_t", "x_h"), rows.stride()[:4], strict=True)),
                **dict(zip(("m_p", "m_b", "m_n", "m_h"), columns.stride()[:4], strict=True)),
                "C": block_size, "R": R if products == 1 else 1, "D": D, "BD": padded(D), "NP": n_columns,
                "PRODUCTS": products,
            },
            sizes=sizes,
        )  # fmt: skip
    shared |= {"NB": NB, "CHUNKS": chunks, "G": G, "CHUNK": CHUNK}
    block_count.launch(
        lambda c: (words, chunks, B * selectors), {"bits": bits, "counts": counts, **shared}, sizes=sizes
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    block_list.launch(
        lambda c: (chunks, B * selectors),
        {
            "bits": bits, "counts": counts, "ends": ends, "pairs": pairs, "tokens": tokens, **shared, "S": S,
            "C": block_size,
        },
        sizes=sizes,
    )  # fmt: skip
    return pairs, ends


def split(x: Tensor, R: int, dtype: torch.dtype) -> Tensor:
    """Sums of each R heads of x [B, T, H, D] as a large and a small part of 16 bits, [2, B, T, H / R, D]."""
    B, T, H, D = x.shape
    parts = torch.empty((2, B, T, H // R, D), dtype=dtype, device=x.device)
    n = B * T * (H // R)
    if n:
        block_split.launch(
            lambda c: (-(-n // c["BM"]),),
            {
                "x": x, "parts": parts, "ROWS": n, "T": T, "SELECTORS": H // R, **strides("x", x), "R": R, "D": D,
                "BD": padded(D),
            },
            sizes={"ROWS": n},
        )  # fmt: skip
    return parts


def token_ranges(T: int, S: int, block_size: int) -> list[tuple[int, int, int]]:
    """Tokens (first, end) that choose alike, and the columns of scores they need: a power of two above their blocks.

    A tile of scores stays in registers, so one for few blocks holds more tokens.
    """
    ranges = []
    first, columns = 0, FEWEST_COLUMNS
    while first < T:
        last = min(T, columns * block_size - (S - T))  # from there on, a token's own block is no column any more
        if last > first:
            ranges.append((first, last, min(columns, max(32, padded(-(-S // block_size))))))
            first = last
        columns *= 2
    return ranges
