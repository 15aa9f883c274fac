"""One query over a cache (flash decoding): the keys in splits that fill the GPU, then the splits weighed together.

Where that is little work, the last program of a key head to finish its split does the weighing: one launch. Whoever it
is, it goes through the splits in the order of the keys, so the result is the same to the bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.attention.arrivals import arrivals
from archsearch_kernels.attention.kernels import step as kernels
from archsearch_kernels.attention.parallel import LOG2E, precision, processors, rows_in_order, strides, widths
from archsearch_kernels.eager import direct

BLOCK = 128  # keys; a split is a multiple of it, hence of every tile
MAX_SPLITS = 128
COLUMNS = 64  # of the output, that one program of the second kernel makes
MERGED_AT_ONCE = 16384  # numbers that a program merging splits loads before it needs the first
MERGED_BY_ONE = 128 << 10  # bytes of splits that one program merges in less time than a second launch takes


def attention_step(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output [B, 1, H, V] of one query [B, 1, H, D] that sees all of k and v, and its log-sum-exp [B, H, 1].

    Keys and values are read where they lie, for instance in a larger cache. No gradients.
    """
    return direct(_attention_step, q, k, v, sink, scale)


@torch.library.custom_op(
    "archsearch::attention_step",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sink, float scale) -> (Tensor, Tensor)",
)
def _attention_step(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = rows_in_order(q), rows_in_order(k), rows_in_order(v)
    (B, _, H, D), S, (G, V) = q.shape, k.shape[1], v.shape[2:]
    o = torch.empty((B, 1, H, V), dtype=v.dtype, device=v.device)
    lse = torch.empty((B, H, 1), dtype=torch.float32, device=v.device)
    blocks = -(-S // BLOCK)
    length = BLOCK * -(-blocks // splits_of(B * G, blocks, processors(q.device)))
    splits = -(-S // length)
    part = torch.empty((B, H, splits, V), dtype=torch.float32, device=v.device) if splits > 1 else None
    part_lse = torch.empty((B, H, splits), dtype=torch.float32, device=v.device) if splits > 1 else None
    group, wide = H // G, widths(D, V)
    by_the_last = splits > 1 and 4 * splits * group * V <= MERGED_BY_ONE
    together = min(8, 1 << (group - 1).bit_length())  # heads that are merged at a time
    arguments: dict[str, Any] = {
        "q": q, "k": k, "v": v, "sink": sink, "o": o, "lse": lse, "part": part, "part_lse": part_lse,
        "arrived": arrivals(B * G, v.device) if by_the_last else None,
        "S": S, "G": G, "length": length, "splits": splits, "scale2": scale * LOG2E,
        "q_b": q.stride(0), "q_h": q.stride(2), **strides("k", k), **strides("v", v),
        "GROUP": group, "BH": max(16, 1 << (group - 1).bit_length()), **wide,
        "HAS_SINK": sink is not None, "SPLIT": splits > 1, "PRECISION": precision(q),
        "BS": min(MAX_SPLITS, MERGED_AT_ONCE // (together * wide["BV"])), "GP": together,
    }  # fmt: skip
    kernels.attention_step.launch(lambda c: (splits, B * G), arguments, sizes={"S": S, "BG": B * G})
    if splits > 1 and not by_the_last:
        columns = min(COLUMNS, wide["BV"])
        kernels.attention_combine.launch(
            lambda c: (B * H, -(-V // columns)),
            {
                "part": part, "part_lse": part_lse, "sink": sink, "o": o, "lse": lse, "splits": splits, "H": H,
                "V": V, "BV": columns, "BS": 1 << (splits - 1).bit_length(), "HAS_SINK": sink is not None,
            },
            sizes={"BH": B * H},
        )  # fmt: skip
    return o, lse


@_attention_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    B, _, H, _ = q.shape
    return v.new_empty((B, 1, H, v.shape[3])), q.new_empty((B, H, 1), dtype=torch.float32)


@cache
def splits_of(heads: int, blocks: int, processors: int) -> int:
    """Into how many parts the keys of each head go: the fewest that keep the GPU nearly full to the end.

    One program fills a processor: it has all its first tiles on their way at once. More would leave more to merge.
    """
    best, fullest = 1, 0.0
    for splits in range(1, min(blocks, MAX_SPLITS) + 1):
        length = -(-blocks // splits)
        programs = heads * -(-blocks // length)
        full = heads * blocks / (-(-programs // processors) * processors * length)  # of the processors' time
        if full > fullest + 0.01:
            best, fullest = splits, full
        if full >= 0.9:
            break
    return best
