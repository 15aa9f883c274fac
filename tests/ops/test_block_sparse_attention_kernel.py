"""The Triton kernels of block-selected attention against the reference, torch's attention under a mask, and Hopper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    ON_GPU,
    TOLERANCE,
    assert_fits_hopper,
    assert_same,
    error,
    outputs_and_gradients,
    poisoned,
    randn,
)
from torch import Tensor

from archsearch_kernels.block_sparse_attention import (
    block_means,
    block_sparse_attention,
    documents,
    parallel,
    reference,
    step,
)
from archsearch_kernels.launch import recording

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


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape: str) -> None:
    assert_same(kernel, reference.block_sparse_attention, inputs(**SHAPES[shape]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_group", [False, True])
def test_sixteen_bits(dtype: torch.dtype, per_group: bool) -> None:
    assert_same(
        kernel,
        reference.block_sparse_attention,
        inputs(90, B=1, H=4, G=2, top_k=3, block_size=32, dtype=dtype, per_group=per_group),
    )


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
        pairs, ends = parallel.choose(q, k, means, 16, 3, False)
    assert ends[-1] == len(pairs)
    token, j = pairs >> 12, pairs & 63
    assert (token.min(), token.max(), j.max()) == (0, 149, 2)
    assert torch.equal(torch.bincount(token), 2 * (torch.arange(150, device=q.device) // 16 + 1).clamp(max=3))


def test_blocks_that_everybody_reads() -> None:
    """All 256 tokens of a chunk read the same blocks: counters that share an integer do not run into each other."""
    q, k = randn(1, 520, 1, 16), randn(1, 520, 1, 16, scale=0.0)
    pairs, ends = parallel.choose(q, k, reference.block_means(k, 16), 16, 3, False)
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
    _, ends = parallel.choose(q, k, means, 16, 4, per_group)
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


def test_what_is_not_chosen_is_not_read() -> None:
    given = inputs(1, S=67, H=2, top_k=2)
    given["k"][:, 16:32] = 10 * given["q"]  # the block everybody wants
    expected = kernel(**given)
    given["v"][:, :16] = torch.nan
    torch.testing.assert_close(kernel(**given), expected, rtol=0, atol=0)


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


def test_strided_inputs() -> None:
    given = inputs(70, B=1, H=4, G=2, top_k=2)

    def strided(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        q, k = q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([k, k], -1)[..., : k.shape[3]]
        v = v.transpose(2, 3).contiguous().transpose(2, 3)
        return kernel(q=q, k=k, v=v, **options).transpose(1, 2).contiguous().transpose(1, 2)

    assert_same(strided, reference.block_sparse_attention, given)


def test_rows_of_a_batch_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(40, B=3, top_k=2)
    monkeypatch.setattr(parallel, "ROOM", 1)
    assert_same(kernel, reference.block_sparse_attention, given)


@pytest.mark.parametrize("per_group", [False, True])
def test_shared_blocks_and_ranges_of_tokens(monkeypatch: pytest.MonkeyPatch, per_group: bool) -> None:
    """Several programs to a block's readers; tokens of more blocks than one launch of the choice takes."""
    monkeypatch.setattr(parallel, "ROWS", 1)
    monkeypatch.setattr(parallel, "FEWEST_COLUMNS", 32)
    given = inputs(210, S=600, B=1, H=4, G=2, top_k=3, per_group=per_group)
    with recording() as launches:
        assert_same(kernel, reference.block_sparse_attention, given)
    seen = {(x.kernel.name, n, x.arguments[n]) for x in launches for n in ("PARTS", "NP") if n in x.arguments}
    assert {("block_select", "NP", 32), ("block_select", "NP", 64), ("block_backward_keys", "PARTS", 8)} <= seen


def test_repeats_bit_by_bit() -> None:
    given = inputs(60, B=1, H=4, G=2, top_k=3)
    runs = []
    for _ in range(2):
        leaves = {n: x.clone().requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}
        out = kernel(**leaves)
        out.square().sum().backward()
        runs.append([out, *(leaves[n].grad for n in "qkv")])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operators_are_well_formed() -> None:
    given = inputs(35, B=1, top_k=2)
    q, k, v = (given[n].requires_grad_() for n in "qkv")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(parallel._forward, (q, k, v, None, None, None, 16, 2, 0.25, False), test_utils=tests)
    packed = documents.tables(rows_of(35, 5, 20)[:1], 16)
    torch.library.opcheck(parallel._forward, (q, k, v, None, *packed, 16, 2, 0.25, False), test_utils=tests)
    torch.library.opcheck(parallel._means, (k.detach(), 16), test_utils=tests)
    means = reference.block_means(k, 16)
    one = (q[:, :1].detach(), k.detach(), v.detach(), means, 16, 2, 0.25, False)
    torch.library.opcheck(step._step, one, test_utils=tests)


def test_every_block_is_full_attention() -> None:
    given = inputs(40, B=1, top_k=3)
    assert error(kernel(**given), under_a_mask(**given)) < TOLERANCE[torch.float32]


def rows_of(T: int, *lengths: int) -> Tensor:
    """Document numbers [2, T]: the lengths over and over, and in the second row from the last to the first."""
    rows = []
    for order in (lengths, lengths[::-1]):
        of_each = torch.tensor(order * -(-T // sum(order)))
        rows.append(torch.repeat_interleave(torch.arange(len(of_each)), of_each)[:T])
    return torch.stack(rows).to(randn(1).device)


DOCUMENTS: dict[str, tuple[int, ...]] = {
    "one": (1000,),
    "on the edges of blocks": (32, 16, 64),
    "inside blocks": (21, 5, 50, 17),
    "of one token": (1,),
    "of one token among long ones": (70, 1, 1, 1, 40, 1),
    "two ends in every block": (8, 24, 8, 8, 3),
    "one token short of a block": (15, 31, 47),
}
PACKED = ("gqa", "own block only", "groups choose", "odd widths and groups of three", "large blocks", "scale")


@pytest.mark.parametrize("packed", [name for name in DOCUMENTS if name != "of one token"])
@pytest.mark.parametrize("shape", ["gqa", "groups choose"])
def test_documents(shape: str, packed: str) -> None:
    given = inputs(**{**SHAPES[shape], "T": 135})
    given["seq_idx"] = rows_of(135, *DOCUMENTS[packed])
    assert_same(kernel, reference.block_sparse_attention, given)


def test_documents_of_one_token_are_their_values() -> None:
    """So queries and keys have no gradient: a relative error could not be told."""
    given = inputs(135, H=4, G=2, top_k=3)
    given["seq_idx"] = rows_of(135, 1)
    got = outputs_and_gradients(kernel, given)
    expected = outputs_and_gradients(lambda v, **_: v.repeat_interleave(2, 2), {"v": given["v"]})
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x)
    for name in ("gradient of q", "gradient of k"):
        assert got[name].abs().max() < 1e-5


@pytest.mark.parametrize("shape", PACKED)
def test_documents_of_every_shape(shape: str) -> None:
    given = inputs(**SHAPES[shape])
    B, T = given["q"].shape[:2]
    given["seq_idx"] = rows_of(T, 21, 5, 2 * given["block_size"] + 7, 1, 17)[:B]
    assert_same(kernel, reference.block_sparse_attention, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_group", [False, True])
def test_documents_in_sixteen_bits(dtype: torch.dtype, per_group: bool) -> None:
    given = inputs(150, H=4, G=2, top_k=3, block_size=32, dtype=dtype, per_group=per_group)
    given["seq_idx"] = rows_of(150, 13, 120, 6)
    assert_same(kernel, reference.block_sparse_attention, given)


def test_documents_in_shares_and_ranges_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs to a block's readers, several launches of the choice, rows one after the other."""
    monkeypatch.setattr(parallel, "ROWS", 1)
    monkeypatch.setattr(parallel, "FEWEST_COLUMNS", 32)
    monkeypatch.setattr(parallel, "ROOM", 1)
    given = inputs(600, B=2, H=1, top_k=3)
    given["seq_idx"] = rows_of(600, 570, 7, 40)
    with recording() as launches:
        assert_same(kernel, reference.block_sparse_attention, given)
    seen = {(x.kernel.name, n, x.arguments[n]) for x in launches for n in ("PARTS", "NP") if n in x.arguments}
    assert {("block_select", "NP", 32), ("block_select", "NP", 64), ("block_backward_keys", "PARTS", 8)} <= seen


def test_documents_are_as_if_alone() -> None:
    """By their running lengths; means at hand, which are of the row's blocks, change nothing."""
    given = inputs(140, B=1, top_k=3)
    cu_seqlens = torch.tensor([0, 85, 140], device=given["q"].device, dtype=torch.int32)
    means = torch.full_like(reference.block_means(given["k"], 16), float("nan"))
    packed = kernel(**given, cu_seqlens=cu_seqlens, means=means)
    for first, last in ((0, 85), (85, 140)):
        alone = {n: x[:, first:last] if isinstance(x, Tensor) else x for n, x in given.items()}
        assert error(packed[:, first:last], kernel(**alone)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("packed", DOCUMENTS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_windows_of_documents(packed: str, block_size: int) -> None:
    """Every token lies in one window; the past blocks of a token have consecutive numbers, all below its own."""
    seq_idx = rows_of(211, *DOCUMENTS[packed])
    tokens, windows = documents.tables(seq_idx, block_size)
    for row, (opens, own, ahead), table in zip(seq_idx.tolist(), tokens.tolist(), windows.tolist(), strict=True):
        keys = [list(range(*window)) for window in table]
        assert sorted(t for window in keys for t in window) == list(range(211))
        assert max(map(len, keys)) <= block_size
        for t in range(211):
            start = row.index(row[t])
            past = (t - start) // block_size
            begin = start + past * block_size
            assert opens[t] == start
            assert set(range(begin, t + 1)) <= set(keys[own[t]])
            expected = [list(range(begin - i * block_size, begin - (i - 1) * block_size)) for i in range(past, 0, -1)]
            assert keys[ahead[t] - past : ahead[t]] == expected
            assert own[t] >= ahead[t]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 40, 32)}, "q is torch.float32 (1, 40, 32); expected four dimensions"),
        ({"k": (1, 40, 2, 8)}, "k is (1, 40, 2, 8); expected [1, S, G, 16]"),
        ({"v": (1, 39, 2, 16)}, "v is (1, 39, 2, 16); expected [1, 40, 2, V]"),
        ({"q": (1, 40, 3, 16)}, "q has 3 heads, k has 2; expected a multiple"),
        ({"q": (1, 41, 2, 16)}, "q has 41 positions, k has 40; expected 1 to 40"),
        ({"means": (1, 3, 2, 16)}, "means is (1, 3, 2, 16)"),
        ({"top_k": 0}, "top_k 0; expected at least 1"),
        (
            {"block_size": 24, "top_k": 1},
            "the Triton kernel was asked for, but blocks have 24 keys, not one of (16, 32",
        ),
    ],
)
def test_bad_inputs_are_named(change: dict[str, Any], message: str) -> None:
    given = inputs(40, B=1, top_k=2)
    given |= {n: randn(*x) if isinstance(x, tuple) else x for n, x in change.items()}
    with pytest.raises(ValueError, match=r"^block_sparse_attention: ") as caught:
        kernel(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("per_group", [False, True])
def test_fits_hopper(per_group: bool) -> None:
    with recording() as launches:
        given = inputs(160, B=1, H=2, G=1, D=128, block_size=64, top_k=2, dtype=torch.bfloat16, per_group=per_group)
        kernel(**{n: x.requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}).sum().backward()
        with torch.no_grad():
            kernel(**{**given, "q": given["q"][:, :1]})
            for blocks in (256, 512):  # a tile's scores stay in registers
                k, means = randn(1, 64 * blocks, 1, 128, dtype=torch.bfloat16), randn(1, blocks - 1, 1, 128)
                parallel.choose(given["q"][:, :64], k, means, 64, 16, per_group)
    check_spills(launches)


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
def test_documents_fit_hopper(per_group: bool, block_size: int) -> None:
    given = inputs(300, B=1, H=2, G=1, D=128, block_size=block_size, top_k=2, dtype=torch.bfloat16, per_group=per_group)
    given["seq_idx"] = rows_of(300, 200, 70)[:1]
    with recording() as launches:
        kernel(**{n: x.requires_grad_() if n in "qkv" else x for n, x in given.items()}).sum().backward()
    check_spills(launches)


def check_spills(launches: Any) -> None:
    # ptxas 13.1 moves descriptors out of the loops of the gradients and spills for it; 12.9 does not
    assert_fits_hopper(launches, spills=48)


def on_gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test


@on_gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("H", "G", "per_group"), [(8, 8, False), (8, 2, False), (32, 2, True)])
@pytest.mark.parametrize(("block_size", "top_k"), [(64, 16), (32, 8), (128, 4), (512, 3)])
def test_real_sizes(D: int, H: int, G: int, per_group: bool, block_size: int, top_k: int) -> None:
    given = inputs(4099, H=H, G=G, D=D, block_size=block_size, top_k=top_k, per_group=per_group, dtype=torch.bfloat16)
    single = {n: x.float() if isinstance(x, Tensor) else x for n, x in given.items()}

    def expected(**wide: Any) -> Tensor:
        return reference.block_sparse_attention(**{**single, **{n: wide[n].float() for n in "qkv"}})

    assert_same(kernel, expected, given, tolerance=2e-2)  # a few near ties fall differently


@on_gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("H", "G", "per_group"), [(8, 8, False), (8, 2, False), (32, 2, True)])
@pytest.mark.parametrize(("block_size", "top_k"), [(64, 8), (32, 8), (128, 4)])
@pytest.mark.parametrize("lengths", [(3001, 1, 700, 64, 333), (1500, 37, 128), (9000,)])
def test_real_sizes_of_documents(
    D: int, H: int, G: int, per_group: bool, block_size: int, top_k: int, lengths: tuple[int, ...]
) -> None:
    given = inputs(4099, H=H, G=G, D=D, block_size=block_size, top_k=top_k, per_group=per_group, dtype=torch.bfloat16)
    given["seq_idx"] = rows_of(4099, *lengths)
    single = {n: x.float() if n in "qkv" else x for n, x in given.items()}

    def expected(**wide: Any) -> Tensor:
        return reference.block_sparse_attention(**{**single, **{n: wide[n].float() for n in "qkv"}})

    assert_same(kernel, expected, given, tolerance=2e-2)  # a few near ties fall differently


@on_gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_group", [False, True])
def test_twenty_runs_are_equal(per_group: bool, packed: bool) -> None:
    given = inputs(4099, H=16, G=4, D=128, block_size=64, top_k=16, per_group=per_group, dtype=torch.bfloat16)
    given["seq_idx"] = rows_of(4099, 1500, 37, 128) if packed else None
    first: list[Tensor] = []
    for _ in range(20):
        leaves = {n: given[n].clone().requires_grad_() for n in "qkv"}
        out = kernel(**{**given, **leaves})
        out.square().sum().backward()
        run = [out.detach(), *(x.grad for x in leaves.values())]
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


@on_gpu
@torch.no_grad()
def test_step_of_a_long_cache() -> None:
    for per_group, H, G in ((False, 16, 16), (True, 64, 4)):
        given = inputs(1, S=32768, H=H, G=G, D=128, block_size=64, top_k=16, per_group=per_group, dtype=torch.bfloat16)
        given["means"] = reference.block_means(given["k"], 64)
        single = {n: x.float() if isinstance(x, Tensor) else x for n, x in given.items()}
        assert error(kernel(**given), reference.block_sparse_attention(**single)) < 1.5e-2
