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

from archsearch_kernels.block_sparse_attention import kernels
from archsearch_kernels.block_sparse_attention.documents import tables
from archsearch_kernels.eager import direct

PROGRAMS = 2048  # eight for each place where one may run, two to a processor of an H100
MOST_SHARES = 8
ROWS = 64  # a tile; a share of a block's readers has more
FEWEST_COLUMNS = 128  # of scores; for fewer blocks there is one launch
ROOM = 4 << 30  # bytes of parts held at once; rows of a batch are done one after the other above it


def attend(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor | None, block_size: int, top_k: int, scale: float, per_group: bool,
    seq_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Output [B, T, H, V]. Arguments as `block_sparse_attention`'s, already checked."""
    tokens, windows = (None, None) if seq_idx is None else tables(seq_idx, block_size)
    means = None if seq_idx is not None else means  # theirs are of other blocks
    return direct(_forward, q, k, v, means, tokens, windows, block_size, top_k, scale, per_group)[0]


def block_means(k: Tensor, block_size: int) -> Tensor:
    """Mean keys [B, N, G, D] in float32 of the full blocks of k [B, S, G, D] behind its last token."""
    return _means(k, block_size)


@torch.library.custom_op("archsearch::block_means", mutates_args=(), schema="(Tensor k, int block_size) -> Tensor")
def _means(k: Tensor, block_size: int) -> Tensor:
    return mean_keys(k, None, block_size)


def mean_keys(k: Tensor, windows: Tensor | None, block_size: int) -> Tensor:
    """Means of the first N blocks, or windows: there are at most N full ones behind the last token."""
    k = rows_in_order(k)
    B, S, G, D = k.shape
    N = (S - 1) // block_size
    means = torch.empty((B, N, G, D), dtype=torch.float32, device=k.device)
    if N == 0:
        return means
    kernels.block_mean_keys.launch(
        lambda c: (N, B * G),
        {
            "k": k, "means": means, "windows": windows, "N": N, "NB": n_blocks(S, block_size, windows), "S": S, "G": G,
            **strides("k", k), "C": block_size, "D": D, "BD": padded(D),
        },
        sizes={"T": S},
    )  # fmt: skip
    return means


@_means.register_fake
def _(k: Tensor, block_size: int) -> Tensor:
    B, S, G, D = k.shape
    return k.new_empty((B, (S - 1) // block_size, G, D), dtype=torch.float32)


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
    """out [B, T, H, V], log_sums [B, T, H] base 2, pairs and ends: see `kernels`."""
    q, k, v = q.contiguous(), rows_in_order(k), rows_in_order(v)
    means = mean_keys(k, windows, block_size) if means is None else rows_in_order(means)
    (B, T, H), V = q.shape[:3], v.shape[3]
    pairs, ends = choose(q, k, means, block_size, top_k, per_group, tokens, windows)
    out = torch.empty((B, T, H, V), dtype=v.dtype, device=q.device)
    log_sums = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    shared = shared_arguments(q, k, v, pairs, ends, tokens, windows, block_size, top_k, scale, per_group)
    C, R, K, S = block_size, shared["R"], top_k, k.shape[1]
    each = rows_at_once(B, T * H * K * V * q.element_size())
    parts = torch.empty((each * T * H * K, V), dtype=q.dtype, device=q.device)
    peaks = torch.empty((each * T * H * K,), dtype=torch.float32, device=q.device)
    sizes = {"T": T, "HEADS": B * H}
    for first in range(0, B, each):
        n = min(each, B - first)
        blocks, groups = shared["NB"], n * shared["G"]
        kernels.block_forward.launch(
            lambda c, blocks=blocks, groups=groups: (blocks * c["PARTS"], groups),  # type: ignore[misc]
            {**shared, "parts": parts, "peaks": peaks, "B0": first, "CHUNK": kernels.CHUNK},
            sizes=sizes,
        )
        rows = n * T * H
        kernels.block_merge.launch(
            lambda c, rows=rows: (-(-rows // c["BM"]),),  # type: ignore[misc]
            {
                "parts": parts, "peaks": peaks, "tokens": tokens, "out": out, "log_sums": log_sums, "B0": first,
                "ROWS": rows, "T": T, "S": S, "H": H, "K": K, "C": C, "R": R, "V": V, "BV": padded(V), "KP": padded(K),
            },
            sizes=sizes,
        )  # fmt: skip
    return out, log_sums, pairs, ends


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
    new: dict[str, Any] = {"dtype": q.dtype, "device": q.device}
    dq, dk, dv = torch.empty((B, T, H, D), **new), torch.empty((B, S, G, D), **new), torch.empty((B, S, G, V), **new)
    delta = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    sizes = {"T": T, "HEADS": B * H}
    kernels.block_delta.launch(
        lambda c: (-(-B * T * H // c["BM"]),),
        {
            "grad": grad, "out": out, "delta": delta, "ROWS": B * T * H, "V": V, "BV": padded(V),
        },
        sizes=sizes,
    )  # fmt: skip
    C, K = block_size, top_k
    shared = shared_arguments(q, k, v, pairs, ends, tokens, windows, block_size, top_k, scale, per_group)
    shared |= {"grad": grad}
    in_order = sorted_rows(shared, log_sums, delta, B)
    together = keys_at_once(q, V) >= C
    each = rows_at_once(B, T * H * K * D * q.element_size())
    parts = torch.empty((each * T * H * K, D), **new)
    shares = programs_a_block(-(-S // C), each * G, each * T * H * K)
    sums = {"dk": dk, "dv": dv}
    if shares > 1:  # each share of a block's readers has sums of its own
        sums = {n: torch.empty((shares, *x.shape), dtype=torch.float32, device=q.device) for n, x in sums.items()}
    for first in range(0, B, each):
        n = min(each, B - first)
        blocks, groups, rows = shared["NB"], n * G, n * T * H
        kernels.block_backward_keys.launch(
            lambda c, blocks=blocks, groups=groups: (blocks * (C // c["BN"]) * shares, groups),  # type: ignore[misc]
            {
                **shared, **in_order, **sums, "dk_p": dk.numel(), "dv_p": dv.numel(), "parts": parts, "B0": first,
                "CHUNK": kernels.CHUNK, "WITH_DQ": together, "PARTS": shares,
            },
            sizes=sizes,
        )  # fmt: skip
        if not together:
            kernels.block_backward_queries.launch(
                lambda c, blocks=blocks, groups=groups: (blocks * c["PARTS"], groups),  # type: ignore[misc]
                {**shared, "log_sums": log_sums, "delta": delta, "parts": parts, "B0": first},
                sizes=sizes,
            )
        kernels.block_merge_gradient.launch(
            lambda c, rows=rows: (-(-rows // c["BM"]),),  # type: ignore[misc]
            {
                "parts": parts, "tokens": tokens, "dq": dq, "B0": first, "ROWS": rows, "T": T, "S": S, "H": H, "K": K,
                "scale": scale, "C": C, "R": shared["R"], "D": D, "BD": padded(D),
            },
            sizes=sizes,
        )  # fmt: skip
    for out_sum, x in ((dk, sums["dk"]), (dv, sums["dv"])) if shares > 1 else ():
        kernels.block_sum_parts.launch(
            lambda c, x=x: (-(-x[0].numel() // c["BLOCK"]),),  # type: ignore[misc]
            {"parts": x, "out": out_sum, "N": x[0].numel(), "PARTS": shares},
            sizes=sizes,
        )
    return dq, dk, dv


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


def choose(
    q: Tensor, k: Tensor, means: Tensor, block_size: int, top_k: int, per_group: bool,
    tokens: Tensor | None = None, windows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chosen (entity, block) pairs in the order of their blocks, and the running sums that divide them up."""
    (B, T, H, D), S, G = q.shape, k.shape[1], k.shape[2]
    selectors, R, per_keys = roles(H, G, per_group)
    NB = n_blocks(S, block_size, windows)
    words, chunks = -(-NB // 32), -(-T // kernels.CHUNK)
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
        kernels.block_select.launch(
            lambda c, n=last - first: (-(-n // c["BT"]), B * selectors),  # type: ignore[misc]
            {
                "rows": rows, "means": columns, "bits": bits, "tokens": tokens, "FROM": first, "TO": last, **shared,
                "S": S, "top_k": top_k, **dict(zip(("x_p", "x_b", "x_t", "x_h"), rows.stride(), strict=False)),
                **dict(zip(("m_p", "m_b", "m_n", "m_h"), columns.stride(), strict=False)),
                "C": block_size, "R": R if products == 1 else 1, "D": D, "BD": padded(D), "NP": n_columns,
                "PRODUCTS": products,
            },
            sizes=sizes,
        )  # fmt: skip
    shared |= {"NB": NB, "CHUNKS": chunks, "G": G, "CHUNK": kernels.CHUNK}
    kernels.block_count.launch(
        lambda c: (words, chunks, B * selectors), {"bits": bits, "counts": counts, **shared}, sizes=sizes
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    kernels.block_list.launch(
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
        kernels.block_split.launch(
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
        "LISTS": -(-T // kernels.CHUNK) * per_keys, "SELECTORS": selectors, "PER_KEYS": per_keys, "G": G,
        "K": top_k, "scale": scale,
        **strides("k", k), **strides("v", v),
        "C": block_size, "R": R, "D": D, "V": V, "BD": padded(D), "BV": padded(V),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def sorted_rows(shared: dict[str, Any], log_sums: Tensor, delta: Tensor, B: int) -> dict[str, Tensor]:
    """log_sums and delta [pairs, R] in the order of `pairs`."""
    pairs, R, G = shared["pairs"], shared["R"], shared["G"]
    found = {name: torch.empty(pairs.numel() * R, dtype=torch.float32, device=pairs.device) for name in ("l", "d")}
    alike = ("pairs", "ends", "T", "NB", "LISTS", "SELECTORS", "PER_KEYS", "G", "R")
    kernels.block_sort_rows.launch(
        lambda c: (-(-pairs.numel() // (B * G * (c["BM"] // R))), B * G),
        {
            **{name: shared[name] for name in alike}, "log_sums": log_sums, "delta": delta,
            "log_sums_sorted": found["l"], "delta_sorted": found["d"],
        },
        sizes={"T": shared["T"], "HEADS": B * G},
    )  # fmt: skip
    return {"log_sums": found["l"], "delta": found["d"]}


def roles(H: int, G: int, per_group: bool) -> tuple[int, int, int]:
    """How many select, query heads under each selector, and selectors to one head of the keys."""
    return (G, H // G, 1) if per_group else (H, 1, H // G)


def table_sizes(
    B: int, T: int, S: int, H: int, G: int, block_size: int, top_k: int, per_group: bool, NB: int
) -> tuple[int, int]:
    """How many pairs there are (with documents: at most), and how many counts lead to them: from the shapes alone."""
    selectors, _, per_keys = roles(H, G, per_group)
    taken = T * top_k
    for own in range(min(top_k - 1, -(-S // block_size))):  # a token of block `own` has that many past ones
        tokens = min(S, (own + 1) * block_size) - max(S - T, own * block_size)
        taken -= max(0, tokens) * (top_k - 1 - own)
    return B * selectors * taken, B * G * NB * -(-T // kernels.CHUNK) * per_keys


def n_blocks(S: int, block_size: int, windows: Tensor | None) -> int:
    """Blocks that the kernels number."""
    return -(-S // block_size) if windows is None else windows.shape[1]


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


def padded(width: int) -> int:
    """The next power of two, 16 at least: what a tensor core's product takes."""
    return max(16, 1 << (width - 1).bit_length())


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Steps of [B, T, H, :] in elements."""
    return {f"{name}_b": x.stride(0), f"{name}_t": x.stride(1), f"{name}_h": x.stride(2)}


def rows_in_order(x: Tensor) -> Tensor:
    """x itself where the elements of a row lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
