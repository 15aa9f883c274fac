"""The Triton kernels of block-selected attention: outputs and gradients against the reference, and Hopper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_sparse_inputs import SHAPES, check_spills, inputs, kernel, on_gpu, rows_of
from kernel_checks import assert_same, randn
from torch import Tensor

from archsearch_kernels.block_sparse_attention import documents, parallel, reference, selection, step
from archsearch_kernels.launch import recording


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
    monkeypatch.setattr(selection, "FEWEST_COLUMNS", 32)
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
    torch.library.opcheck(selection.block_means, (k.detach(), 16), test_utils=tests)
    means = reference.block_means(k, 16)
    one = (q[:, :1].detach(), k.detach(), v.detach(), means, 16, 2, 0.25, False)
    torch.library.opcheck(step.attend_step, one, test_utils=tests)


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
    with recording(dry=True) as launches:
        given = inputs(160, B=1, H=2, G=1, D=128, block_size=64, top_k=2, dtype=torch.bfloat16, per_group=per_group)
        kernel(**{n: x.requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}).sum().backward()
        with torch.no_grad():
            kernel(**{**given, "q": given["q"][:, :1]})
            for blocks in (256, 512):  # a tile's scores stay in registers
                k, means = randn(1, 64 * blocks, 1, 128, dtype=torch.bfloat16), randn(1, blocks - 1, 1, 128)
                selection.choose(given["q"][:, :64], k, means, 64, 16, per_group)
    forward = next(x for x in launches if x.kernel.name == "block_forward")
    assert forward.kernel.configs(forward.arguments)[0]["PARTS"] == (4 if per_group else 2)
    check_spills(launches)


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
