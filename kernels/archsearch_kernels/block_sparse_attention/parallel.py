"""Block-selected attention over whole sequences: choose, list each block's readers, attend block by block, merge.

Forward in 16 bits: eight launches and a running sum, nine where heads choose together, one more for each doubling of
128 blocks; backward: four, and two where several programs share a block's readers. Nothing is read by the host, no
result depends on the order of programs. The parts of a query, one for each of its blocks, pass through memory: 2 V
bytes and as many again to merge them, which is what this form costs beside its products. Gathering blocks by query
instead would read 64 keys of 128 numbers and their values, 32 KB, for every query group and block: by an estimate more
time in the L2 cache than the parts take in memory unless well over 16 heads share their choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.block_sparse_attention.documents import tables
from archsearch_kernels.block_sparse_attention.kernels.backward import (
    block_backward_keys,
    block_backward_queries,
    block_delta,
    block_merge_gradient,
    block_sort_rows,
    block_sum_parts,
)
from archsearch_kernels.block_sparse_attention.kernels.forward import block_forward, block_merge
from archsearch_kernels.block_sparse_attention.kernels.readers import CHUNK
from archsearch_kernels.block_sparse_attention.selection import choose, mean_keys
from archsearch_kernels.block_sparse_attention.shapes import (
    n_blocks,
    padded,
    roles,
    rows_in_order,
    strides,
    table_sizes,
)
from archsearch_kernels.eager import direct

PROGRAMS = 2048  # eight for each place where one may run, two to a processor of an H100
MOST_SHARES = 8
ROWS = 64  # a tile; a share of a block's readers has more
ROOM = 4 << 30  # bytes of parts held at once; rows of a batch are done one after the other above it


def attend(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor | None, block_size: int, top_k: int, scale: float, per_group: bool,
    seq_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Output [B, T, H, V]. Arguments as `block_sparse_attention`'s, already checked."""
    tokens, windows = (None, None) if seq_idx is None else tables(seq_idx, block_size)
    means = None if seq_idx is not None else means  # theirs are of other blocks
    return direct(_forward, q, k, v, means, tokens, windows, block_size, top_k, scale, per_group)[0]


@torch.library.custom_op(
    "archsearch::block_sparse_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? means, Tensor? tokens, Tensor? windows, int block_size, int top_k, "
    "float scale, bool per_group) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor | None, tokens: Tensor | None, windows: Tensor | None,
    block_size: int, top_k: int, scale: float, per_group: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, T, H, V], log_sums [B, T, H] base 2, pairs and ends: see `kernels/readers.py`."""
    q, k, v = q.contiguous(), rows_in_order(k), rows_in_order(v)
    means = mean_keys(k, windows, block_size) if means is None else rows_in_order(means)
    (B, T, H), V = q.shape[:3], v.shape[3]
    pairs, ends = choose(q, k, means, block_size, top_k, per_group, tokens, windows)
    out = torch.empty((B, T, H, V), dtype=v.dtype, device=q.device)
    log_sums = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    shared = shared_arguments(q, k, v, pairs, ends, tokens, windows, block_size, top_k, scale, per_group)
    each = rows_at_once(B, T * H * top_k * V * q.element_size())
    parts = torch.empty((each * T * H * top_k, V), dtype=q.dtype, device=q.device)
    peaks = torch.empty((each * T * H * top_k,), dtype=torch.float32, device=q.device)
    for first in range(0, B, each):
        attend_rows(shared, parts, peaks, out, log_sums, first, min(each, B - first))
    return out, log_sums, pairs, ends


def attend_rows(
    shared: dict[str, Any], parts: Tensor, peaks: Tensor, out: Tensor, log_sums: Tensor, first: int, n: int
) -> None:
    """Write out and log_sums of n rows of the batch from `first` on, by way of parts and peaks."""
    (B, T, H, V), K = out.shape, shared["K"]
    rows, sizes = n * T * H, {"T": T, "HEADS": B * H}
    block_forward.launch(
        lambda c: (shared["NB"] * c["PARTS"], n * shared["G"]),
        {**shared, "parts": parts, "peaks": peaks, "B0": first, "CHUNK": CHUNK},
        sizes=sizes,
    )
    block_merge.launch(
        lambda c: (-(-rows // c["BM"]),),
        {
            "parts": parts, "peaks": peaks, "tokens": shared["tokens"], "out": out, "log_sums": log_sums, "B0": first,
            "ROWS": rows, "T": T, "S": shared["S"], "H": H, "K": K, "C": shared["C"], "R": shared["R"], "V": V,
            "BV": padded(V), "KP": padded(K),
        },
        sizes=sizes,
    )  # fmt: skip


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor | None, tokens: Tensor | None, windows: Tensor | None,
    block_size: int, top_k: int, scale: float, per_group: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), S, G = q.shape, k.shape[1], k.shape[2]
    n_pairs, n_counts = table_sizes(B, T, S, H, G, block_size, top_k, per_group, n_blocks(S, block_size, windows))
    return (
        v.new_empty((B, T, H, v.shape[3])),
        q.new_empty((B, T, H), dtype=torch.float32),
        q.new_empty((n_pairs,), dtype=torch.int32),
        q.new_empty((n_counts,), dtype=torch.int32),
    )


@torch.library.custom_op(
    "archsearch::block_sparse_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, Tensor pairs, Tensor ends, "
    "Tensor? tokens, Tensor? windows, int block_size, int top_k, float scale, bool per_group) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, pairs: Tensor, ends: Tensor,
    tokens: Tensor | None, windows: Tensor | None, block_size: int, top_k: int, scale: float, per_group: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, q, k, v = grad.contiguous(), q.contiguous(), rows_in_order(k), rows_in_order(v)
    (B, T, H, D), (S, G, V) = q.shape, v.shape[1:]
    shared = shared_arguments(q, k, v, pairs, ends, tokens, windows, block_size, top_k, scale, per_group)
    shared |= {"grad": grad}
    delta = output_by_gradient(grad, out)
    in_order = sorted_rows(shared, log_sums, delta)
    each = rows_at_once(B, T * H * top_k * D * q.element_size())
    shares = programs_a_block(-(-S // block_size), each * G, each * T * H * top_k)
    dq = torch.empty_like(q)
    parts = torch.empty((each * T * H * top_k, D), dtype=q.dtype, device=q.device)
    sums: dict[str, Any] = {"dtype": q.dtype if shares == 1 else torch.float32, "device": q.device}
    dk, dv = torch.empty((shares, B, S, G, D), **sums), torch.empty((shares, B, S, G, V), **sums)
    together = keys_at_once(q, V) >= block_size
    for first in range(0, B, each):
        n = min(each, B - first)
        gradients_of_keys({**shared, **in_order}, dk, dv, parts, first, n, together)
        if not together:
            parts_of_queries({**shared, "log_sums": log_sums, "delta": delta}, parts, first, n)
        gradients_of_queries(shared, parts, dq, first, n)
    return dq, added_up(dk, q.dtype, T, H), added_up(dv, q.dtype, T, H)


def output_by_gradient(grad: Tensor, out: Tensor) -> Tensor:
    """Products of their rows [B, T, H] in float32."""
    B, T, H, V = grad.shape
    delta = torch.empty((B, T, H), dtype=torch.float32, device=grad.device)
    block_delta.launch(
        lambda c: (-(-B * T * H // c["BM"]),),
        {"grad": grad, "out": out, "delta": delta, "ROWS": B * T * H, "V": V, "BV": padded(V)},
        sizes={"T": T, "HEADS": B * H},
    )
    return delta


def sorted_rows(shared: dict[str, Any], log_sums: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """log_sums and delta [pairs, R] in the order of `pairs`."""
    pairs, R, groups = shared["pairs"], shared["R"], len(log_sums) * shared["G"]
    found = {
        name: torch.empty(pairs.numel() * R, dtype=torch.float32, device=pairs.device) for name in ("log_sums", "delta")
    }
    alike = ("pairs", "ends", "T", "NB", "LISTS", "SELECTORS", "PER_KEYS", "G", "R")
    block_sort_rows.launch(
        lambda c: (-(-pairs.numel() // (groups * (c["BM"] // R))), groups),
        {
            **{name: shared[name] for name in alike}, "log_sums": log_sums, "delta": delta,
            "log_sums_sorted": found["log_sums"], "delta_sorted": found["delta"],
        },
        sizes={"T": shared["T"], "HEADS": groups},
    )  # fmt: skip
    return found


def gradients_of_keys(
    shared: dict[str, Any], dk: Tensor, dv: Tensor, parts: Tensor, first: int, n: int, with_dq: bool
) -> None:
    """Write dk and dv [shares, B, S, G, :] of n rows of the batch from `first` on, and if asked the parts of dq."""
    (B, T, H), shares = shared["q"].shape[:3], len(dk)
    block_backward_keys.launch(
        lambda c: (shared["NB"] * (shared["C"] // c["BN"]) * shares, n * shared["G"]),
        {
            **shared, "dk": dk, "dv": dv, "dk_p": dk[0].numel(), "dv_p": dv[0].numel(), "parts": parts, "B0": first,
            "CHUNK": CHUNK, "WITH_DQ": with_dq, "PARTS": shares,
        },
        sizes={"T": T, "HEADS": B * H},
    )  # fmt: skip


def parts_of_queries(shared: dict[str, Any], parts: Tensor, first: int, n: int) -> None:
    """Write the parts of dq of n rows of the batch from `first` on."""
    B, T, H = shared["q"].shape[:3]
    block_backward_queries.launch(
        lambda c: (shared["NB"] * c["PARTS"], n * shared["G"]),
        {**shared, "parts": parts, "B0": first},
        sizes={"T": T, "HEADS": B * H},
    )


def gradients_of_queries(shared: dict[str, Any], parts: Tensor, dq: Tensor, first: int, n: int) -> None:
    """Write dq of n rows of the batch from `first` on."""
    B, T, H, D = dq.shape
    rows = n * T * H
    block_merge_gradient.launch(
        lambda c: (-(-rows // c["BM"]),),
        {
            "parts": parts, "tokens": shared["tokens"], "dq": dq, "B0": first, "ROWS": rows, "T": T, "S": shared["S"],
            "H": H, "K": shared["K"], "scale": shared["scale"], "C": shared["C"], "R": shared["R"], "D": D,
            "BD": padded(D),
        },
        sizes={"T": T, "HEADS": B * H},
    )  # fmt: skip


def added_up(sums: Tensor, dtype: torch.dtype, T: int, H: int) -> Tensor:
    """The sum over the first axis of [shares, B, S, G, :] in `dtype`, which a single share has already."""
    if len(sums) == 1:
        return sums[0]
    out = torch.empty(sums.shape[1:], dtype=dtype, device=sums.device)
    block_sum_parts.launch(
        lambda c: (-(-out.numel() // c["BLOCK"]),),
        {"parts": sums, "out": out, "N": out.numel(), "PARTS": len(sums)},
        sizes={"T": T, "HEADS": len(out) * H},
    )
    return out


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, pairs: Tensor, ends: Tensor,
    tokens: Tensor | None, windows: Tensor | None, block_size: int, top_k: int, scale: float, per_group: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, tokens, windows, *options = inputs
    ctx.save_for_backward(q, k, v, *output, tokens, windows)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = options


def _gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*direct(_backward, grad, *ctx.saved_tensors, *ctx.options), *[None] * 7)


torch.library.register_autograd("archsearch::block_sparse_attention", _gradients, setup_context=_keep)


def shared_arguments(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, ends: Tensor, tokens: Tensor | None, windows: Tensor | None,
    block_size: int, top_k: int, scale: float, per_group: bool,
) -> dict[str, Any]:  # fmt: skip
    """What every kernel that walks through the blocks' readers takes."""
    (_, T, H, D), (S, G, V) = q.shape, v.shape[1:]
    selectors, R, per_keys = roles(H, G, per_group)
    return {
        "q": q, "k": k, "v": v, "pairs": pairs, "ends": ends, "tokens": tokens, "windows": windows, "T": T, "S": S,
        "NB": n_blocks(S, block_size, windows),
        "LISTS": -(-T // CHUNK) * per_keys, "SELECTORS": selectors, "PER_KEYS": per_keys, "G": G,
        "K": top_k, "scale": scale,
        **strides("k", k), **strides("v", v),
        "C": block_size, "R": R, "D": D, "V": V, "BD": padded(D), "BV": padded(V),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def rows_at_once(B: int, size: int) -> int:
    """How many rows of the batch, of so many bytes of parts each, are done in one go."""
    return max(1, min(B, ROOM // max(size, 1)))


def programs_a_block(NB: int, groups: int, rows: int) -> int:
    """How many programs share the readers of one block: more where blocks are too few to keep a device in balance.

    rows: of all blocks together. The first block of 128 has three times the average of readers, so some programs end
    long after the others.
    """
    shares = 1
    while NB * groups * shares < PROGRAMS and shares < MOST_SHARES and 2 * shares * ROWS * NB * groups <= rows:
        shares *= 2
    return shares


def keys_at_once(q: Tensor, V: int) -> int:
    """Up to so many keys a block, one kernel makes all three gradients; registers decide."""
    if q.element_size() == 4:
        return 16
    return 64 if max(q.shape[3], V) <= 128 else 32
