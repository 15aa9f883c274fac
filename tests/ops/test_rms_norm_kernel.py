"""RMSNorm's kernels against plain torch: with a residual, with a gate, in groups, in rows of any width and stride."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU, assert_fits_hopper, assert_same, error, outputs_and_gradients, randn

from archsearch_kernels.launch import forcing, recording
from archsearch_kernels.rms_norm import add_rms_norm, fused, gated_rms_norm, reference, rms_norm
from archsearch_kernels.rms_norm.kernels import WIDEST_BACKWARD
from archsearch_kernels.rows.kernels import sum_partials

GATES = {"gated": True, "gate first": False}


def kernel(**inputs):
    return (add_rms_norm if "residual" in inputs else rms_norm)(**inputs, implementation="triton")


def plain(**inputs):
    return (reference.add_rms_norm if "residual" in inputs else reference.rms_norm)(**inputs)


def gated(**inputs):
    return gated_rms_norm(**inputs, implementation="triton")


@pytest.mark.parametrize("shape", [(1, 8), (63, 24), (2, 5, 100), (2, 3, 2, 64), (3, 1100)], ids=str)
def test_it_is_the_norm(shape):
    inputs = {"x": randn(*shape), "weight": randn(shape[-1], seed=1)}
    assert_same(kernel, plain, inputs)
    assert_same(kernel, plain, {"x": inputs["x"]})
    assert_same(kernel, plain, inputs | {"residual": randn(*shape, seed=2)})


@pytest.mark.parametrize("first", GATES.values(), ids=GATES)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_the_gated_norm(first, activation, groups):
    options = {"activation": activation, "norm_before_gate": first, "groups": groups}
    inputs = {"x": randn(2, 35, 60), "gate": randn(2, 35, 60, seed=1), "weight": randn(60, seed=2)}
    assert_same(gated, reference.gated_rms_norm, inputs | options)
    del inputs["weight"]
    assert_same(gated, reference.gated_rms_norm, inputs | options)


def test_rows_wider_than_registers():
    x, weight = randn(2, WIDEST_BACKWARD + 8), randn(WIDEST_BACKWARD + 8, seed=1)
    with recording() as launches:
        assert_same(kernel, plain, {"x": x, "weight": weight, "residual": x.flip(1)})
    assert "rms_norm_backward_wide" in {x.kernel.name for x in launches}


@pytest.mark.parametrize("width", [128, 64], ids=["whole", "in two parts"])
def test_rows_in_pieces(monkeypatch, width):
    """As rows are read that are wider than registers, and those that are wider than a program's sums."""
    monkeypatch.setattr(fused, "WIDEST_BACKWARD", 0)
    monkeypatch.setattr(fused, "WIDTH", width)
    x, other, weight = randn(5, 100), randn(5, 100, seed=1), randn(100, seed=2)
    piece = {"BC": 32, "num_warps": 4}
    with forcing("rms_norm_forward", piece | {"BR": 2}), forcing("rms_norm_backward_wide", piece):
        assert_same(kernel, plain, {"x": x})
        assert_same(kernel, plain, {"x": x, "weight": weight, "residual": other})
        for first in GATES.values():
            inputs = {"x": x, "gate": other, "weight": weight, "norm_before_gate": first}
            assert_same(gated, reference.gated_rms_norm, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_a_wide_weight(dtype):
    """As under autocast: activations in half precision, the weight and its gradient in float32."""
    x, other = randn(9, 70, dtype=dtype), randn(9, 70, seed=1, dtype=dtype)
    assert_same(kernel, plain, {"x": x, "weight": randn(70, seed=2)})
    assert_same(kernel, plain, {"x": x, "weight": randn(70, seed=2, dtype=dtype), "residual": other})
    assert_same(gated, reference.gated_rms_norm, {"x": x, "gate": other, "weight": randn(70, seed=2)})


def test_a_wide_residual_stream():
    """Branches in half precision, the stream in float32: h stays wide, y is narrow."""
    x, weight, residual = randn(9, 70, dtype=torch.bfloat16), randn(70, seed=1), randn(9, 70, seed=2)
    inputs = {"x": x, "weight": weight, "residual": residual}
    got = outputs_and_gradients(kernel, inputs)
    expected = outputs_and_gradients(plain, inputs)
    assert {n: g.dtype for n, g in got.items()} == {n: g.dtype for n, g in expected.items()}
    assert got["output 0"].dtype == torch.bfloat16
    assert got["output 1"].dtype == torch.float32
    assert all(error(g, expected[n]) < 1e-2 for n, g in got.items())
    y = kernel(x=residual, weight=weight, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert error(y, reference.rms_norm(residual, weight)) < 1e-2


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_may_go_unused(used):
    inputs = {"x": randn(4, 24), "weight": randn(24, seed=1), "residual": randn(4, 24, seed=2)}
    given = [t.clone().requires_grad_() for t in inputs.values()]
    grads = []
    for run in (kernel, plain):
        out = run(**dict(zip(inputs, given, strict=True)))[used]
        grads.append(torch.autograd.grad(out.square().sum() + given[1].sum() * 0, given))
    torch.testing.assert_close(*grads, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("config", [{"BP": 32, "BD": 16, "num_warps": 4}, None], ids=["in pieces", "at once"])
def test_partial_sums_of_many_programs(config):
    partial, bias = randn(70, 3, 20), torch.empty(20, device=DEVICE)
    weight = torch.empty(20, 2, device=DEVICE)
    with forcing("sum_partials", config) if config else nullcontext():
        sum_partials.launch(
            lambda c: (-(-20 // c["BD"]), 3),
            {"partial": partial, "weight": weight, "bias": bias, "P": 70, "D": 20, "J": 3, "W": 2},
            sizes={"P": 70},
        )
    torch.testing.assert_close(torch.cat([weight.t(), bias[None]]), partial.sum(0), rtol=1e-5, atol=1e-5)


def test_slices_and_heads_are_read_where_they_lie():
    wide, weight = randn(2, 5, 3 * 64 + 8), randn(16, seed=1)
    q = wide[..., 64:128].unflatten(-1, (4, 16))  # heads of a slice: two strides
    gate = randn(2, 5, 4, 16, seed=2)
    torch.testing.assert_close(kernel(x=q, weight=weight), kernel(x=q.contiguous(), weight=weight))
    expected = gated(x=gate, gate=q.contiguous(), weight=weight)
    torch.testing.assert_close(gated(x=gate, gate=q, weight=weight), expected)
    swapped = randn(5, 2, 4, 16).transpose(0, 1)  # no two strides walk this one
    torch.testing.assert_close(kernel(x=swapped, weight=weight), kernel(x=swapped.contiguous(), weight=weight))
    with recording() as launches:
        kernel(x=q, weight=weight)
    assert launches[0].arguments["x"].data_ptr() == q.data_ptr()
    assert_same(
        lambda wide, weight: kernel(x=wide[..., 64:128].unflatten(-1, (4, 16)), weight=weight),
        lambda wide, weight: reference.rms_norm(wide[..., 64:128].unflatten(-1, (4, 16)), weight),
        {"wide": wide, "weight": weight},
    )


def test_small_and_large_rows_keep_their_scale():
    x = torch.stack([randn(64, scale=1e-4), torch.zeros(64, device=DEVICE), randn(64, scale=1e4)])
    assert_same(kernel, plain, {"x": x, "weight": randn(64, seed=1)})


def test_transformers_agree():
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    x, gate, weight = randn(3, 5, 64), randn(3, 5, 64, seed=1), randn(64, seed=2)
    if "group_size" not in inspect.signature(MambaRMSNormGated).parameters:
        pytest.skip("this transformers norms no groups")
    mamba = MambaRMSNormGated(64, 32, eps=1e-6)
    for theirs, first, groups in ((Qwen3NextRMSNormGated(64, eps=1e-6), True, 1), (mamba, False, 2)):
        theirs.weight.data = weight
        got = gated(x=x, gate=gate, weight=weight, norm_before_gate=first, groups=groups)
        torch.testing.assert_close(got, theirs(x, gate).detach(), rtol=1e-4, atol=1e-5)


def test_repeated_runs_agree_to_the_bit():
    inputs = {"x": randn(70, 48), "gate": randn(70, 48, seed=1), "weight": randn(48, seed=2)}
    first, again = (outputs_and_gradients(gated, inputs) for _ in range(2))
    assert all(torch.equal(first[n], g) for n, g in again.items())


def test_torch_accepts_the_operators():
    from archsearch_kernels.rms_norm.fused import gated_rms_norm_op, rms_norm_op

    x, other, weight = (randn(*s).requires_grad_() for s in ((3, 20), (3, 20), (20,)))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(rms_norm_op, (x, weight, other, 1e-6, torch.float32))
    torch.library.opcheck(rms_norm_op, (x, None, None, 1e-6, torch.bfloat16), test_utils=tests)
    torch.library.opcheck(gated_rms_norm_op, (x, other, weight, 1e-6, False, True, 2), test_utils=tests)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"weight is \(4,\) on \S+; expected \(3,\)"):
        rms_norm(randn(2, 3), randn(4))
    with pytest.raises(ValueError, match=r"residual is \(2, 4\) on \S+; expected \(2, 3\)"):
        add_rms_norm(randn(2, 3), randn(2, 4))
    with pytest.raises(ValueError, match=r"gate is \(3,\) on \S+; expected \(2, 3\)"):
        gated_rms_norm(randn(2, 3), randn(3))
    with pytest.raises(ValueError, match="activation is 'relu'; expected silu or sigmoid"):
        gated_rms_norm(randn(2, 3), randn(2, 3), activation="relu")
    with pytest.raises(ValueError, match="groups is 2, which does not divide"):
        gated_rms_norm(randn(2, 3), randn(2, 3), groups=2)
    with pytest.raises(ValueError, match="does not compute in float64"):
        kernel(x=randn(2, 3).double())
    assert rms_norm(randn(2, 3).double()).dtype == torch.float64


def launches_of_real_widths(widths=(64, 128, 2048, 8192, 16384)):
    bf16 = {"dtype": torch.bfloat16}
    with recording(dry=True) as launches:
        for C in widths:
            x, other, weight = randn(2, C, **bf16), randn(2, C, **bf16), randn(C)
            outputs_and_gradients(kernel, {"x": x, "weight": weight})
            outputs_and_gradients(kernel, {"x": x, "weight": weight, "residual": other})
            for first in GATES.values():
                outputs_and_gradients(gated, {"x": x, "gate": other, "weight": weight, "norm_before_gate": first})
    return launches


def test_the_default_configuration_fits_hopper():
    assert_fits_hopper(launches_of_real_widths((2048, 16384)))


def test_the_widest_rows_that_are_loaded_ahead_fit_hopper():
    x, other, weight = randn(2, WIDEST_BACKWARD), randn(2, WIDEST_BACKWARD), randn(WIDEST_BACKWARD)
    with recording(dry=True) as launches:
        outputs_and_gradients(kernel, {"x": x, "weight": weight, "residual": other})
        outputs_and_gradients(gated, {"x": x, "gate": other, "weight": weight})
    ahead = [launch for launch in launches if launch.kernel.name == "rms_norm_backward"]
    assert len(ahead) == 2
    assert_fits_hopper(ahead)


@pytest.mark.parametrize("C", [pytest.param(c, marks=ON_GPU) for c in (64, 128, 768, 2048, 5000, 8192, 16384)])
def test_real_sizes(C):
    N = 2**24 // C + 1
    bf16 = {"dtype": torch.bfloat16}
    x, other, weight = randn(N, C, **bf16), randn(N, C, seed=1, **bf16), randn(C, seed=2)
    assert_same(kernel, plain, {"x": x, "weight": weight, "residual": other})
    for first in GATES.values():
        inputs = {"x": x, "gate": other, "weight": weight, "norm_before_gate": first}
        assert_same(gated, reference.gated_rms_norm, inputs)
        once = outputs_and_gradients(gated, inputs)
        for _ in range(10):
            assert all(torch.equal(once[n], g) for n, g in outputs_and_gradients(gated, inputs).items())
