"""Packed documents in the kernels of block-selected attention: every document has blocks of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_sparse_inputs import SHAPES, check_spills, inputs, kernel, on_gpu, rows_of
from kernel_checks import TOLERANCE, assert_same, error, outputs_and_gradients
from torch import Tensor

from archsearch_kernels.block_sparse_attention import documents, parallel, reference, selection
from archsearch_kernels.launch import recording

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
    given = inputs(**{**SHAPES[shape], "T": 115})
    given["seq_idx"] = rows_of(115, *DOCUMENTS[packed])
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
    monkeypatch.setattr(parallel, "MOST_SHARES", 2)
    monkeypatch.setattr(selection, "FEWEST_COLUMNS", 32)
    monkeypatch.setattr(parallel, "ROOM", 1)
    given = inputs(545, B=2, H=1, top_k=3)
    given["seq_idx"] = rows_of(545, 530, 7, 10)
    with recording() as launches:
        assert_same(kernel, reference.block_sparse_attention, given)
    seen = {(x.kernel.name, n, x.arguments[n]) for x in launches for n in ("PARTS", "NP") if n in x.arguments}
    assert {("block_select", "NP", 32), ("block_select", "NP", 64), ("block_backward_keys", "PARTS", 2)} <= seen


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


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
def test_documents_fit_hopper(per_group: bool, block_size: int) -> None:
    given = inputs(300, B=1, H=2, G=1, D=128, block_size=block_size, top_k=2, dtype=torch.bfloat16, per_group=per_group)
    given["seq_idx"] = rows_of(300, 200, 70)[:1]
    with recording(dry=True) as launches:
        kernel(**{n: x.requires_grad_() if n in "qkv" else x for n, x in given.items()}).sum().backward()
    check_spills(launches)


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
