"""The short convolution's kernels against plain torch: states, documents, steps, any number of taps up to eight."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, ON_GPU, assert_fits_hopper, assert_same, error, outputs_and_gradients, randn

from archsearch_kernels.launch import recording
from archsearch_kernels.short_conv import reference, short_conv, short_conv_step


def kernel(**inputs):
    return short_conv(**inputs, implementation="triton")


def step(**inputs):
    return short_conv_step(**inputs, implementation="triton")


def inputs(B, T, D, W, *, bias=True, state=True, dtype=torch.float32):
    given = {"x": randn(B, T, D, dtype=dtype), "weight": randn(D, W, seed=1)}
    given |= {"bias": randn(D, seed=2)} if bias else {}
    return given | ({"state": randn(B, W - 1, D, seed=3, dtype=dtype)} if state else {})


def documents(B, T):
    """Boundaries everywhere, some one token apart."""
    return (torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.3).int().cumsum(1).to(DEVICE)


@pytest.mark.parametrize("T", [1, 2, 63, 100, 257])
def test_it_is_the_sum_over_taps(T):
    """257 is longer than one program's tokens, forward and backward."""
    assert_same(kernel, reference.short_conv, inputs(1 + (T < 100), T, 24, 4) | {"silu": T != 63})


@pytest.mark.parametrize("W", [1, 2, 3, 5, 8])
def test_any_number_of_taps(W):
    if W > 1:  # of one tap no state is left to compare
        assert_same(kernel, reference.short_conv, inputs(2, 5, 40, W) | {"silu": True})
    given = inputs(1, 37, 40, W, bias=False, state=False)
    assert_same(lambda **i: kernel(**i)[0], lambda **i: reference.short_conv(**i)[0], given)


@pytest.mark.parametrize("options", [{}, {"silu": True}], ids=["plain", "silu"])
@pytest.mark.parametrize("W", [2, 4])
def test_no_tap_crosses_a_boundary(W, options):
    for T in (9, 70):
        packed = inputs(2, T, 8, W, state=False) | options | {"seq_idx": documents(2, T)}
        assert_same(kernel, reference.short_conv, packed)


def test_packed_is_separate():
    given = inputs(1, 75, 8, 4, state=False) | {"silu": True}
    bounds = [0, 1, 3, 40, 75]
    pieces = [kernel(**given | {"x": given["x"][:, a:b]})[0] for a, b in pairwise(bounds)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    packed, last = kernel(**given, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, torch.cat(pieces, 1), rtol=1e-6, atol=1e-6)
    assert torch.equal(last, given["x"][:, -3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_wide_taps(dtype):
    assert_same(kernel, reference.short_conv, inputs(2, 20, 40, 4, dtype=dtype) | {"silu": True})


def silu_of(z):
    """SiLU of z [n] by a sequence and by a step of one token, whose one tap is 1, and the derivative."""
    x, weight = z.clone().requires_grad_(), torch.ones(len(z), 1, dtype=z.dtype, device=DEVICE)
    y, _ = kernel(x=x[None, None], weight=weight, silu=True)
    (slope,) = torch.autograd.grad(y.sum(), x)
    of_step, _ = step(x=z[None], weight=weight, bias=None, state=z.new_empty(1, 0, len(z)), silu=True)
    return y.detach().flatten(), of_step.flatten(), slope


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_silu_is_right_wherever_it_is_finite(dtype):
    """From where e^-z overflows to where 1 + e^-z is 1; the largest number times the derivative's 1 - sigmoid."""
    limit = torch.finfo(dtype).max
    z = torch.cat([torch.linspace(-120, 120, 1501), torch.tensor([-limit, -1e4, -100.0, 0.0, 100.0, 1e4, limit])])
    z = z.to(DEVICE, dtype)
    wide = z.double().requires_grad_()
    expected = F.silu(wide)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    rtol = 1e-5 + torch.finfo(dtype).eps / 2
    smallest = max(1e-36, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)  # 1e-36: where e^-z overflows
    got, of_step, got_slope = silu_of(z)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=rtol, atol=smallest)
    torch.testing.assert_close(of_step, got, rtol=0, atol=0)
    torch.testing.assert_close(got_slope.double(), slope, rtol=rtol, atol=3e-6)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_silu_is_not_a_number_where_torch_has_none():
    z = torch.tensor([float("inf"), -float("inf"), float("nan")], device=DEVICE)
    x = z.clone().requires_grad_()
    expected = F.silu(x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    for found, wanted in zip(silu_of(z), (expected, expected, slope), strict=True):
        torch.testing.assert_close(found, wanted.detach(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("W", [1, 3, 4])
def test_pieces_and_steps_carry_the_last_inputs(W):
    given = inputs(2, 12, 24, W) | {"silu": True}
    whole, last = kernel(**given)
    x, state, outputs = given.pop("x"), given.pop("state"), []
    kept = state.clone()
    for piece in x.split([2, 1, 1, 5, 1, 2], dim=1):
        if piece.shape[1] == 1:
            before = state
            y, state = step(x=piece, state=state, **given)
            y2, kept = step(x=piece[:, 0], state=kept, inplace=True, **given)
            assert torch.equal(y[:, 0], y2)
            assert before is not state
        else:
            y, state = kernel(x=piece, state=state, **given)
            kept.copy_(state)
        assert torch.equal(kept, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(state, last)


def test_a_step_changes_the_state_it_was_given():
    given = inputs(3, 1, 40, 4, dtype=torch.bfloat16) | {"silu": True}
    whole = torch.zeros(3, 6, 80, dtype=torch.bfloat16, device=DEVICE)
    state = whole[:, 1:4, 8:48]  # a slice: what lies around it stays
    state.copy_(given["state"])
    expected, new = reference.short_conv_step(**{n: t.double() for n, t in given.items() if n != "silu"}, silu=True)
    version = state._version
    y, same = step(**given | {"state": state}, inplace=True)
    assert same is state
    assert state._version > version  # autograd learns of it
    with torch.inference_mode():
        kept = given["state"].clone()
        assert torch.equal(step(**given | {"state": kept}, inplace=True)[0], y)
    assert error(y, expected) < 1e-2
    assert torch.equal(state.double(), new)
    assert whole.count_nonzero() == state.count_nonzero()
    with torch.no_grad():
        assert torch.equal(reference.short_conv_step(**given, inplace=True)[1], state)


def test_gradients_flow_through_a_step():
    for x in (randn(2, 24), randn(2, 1, 24)):
        given = inputs(2, 1, 24, 4) | {"x": x, "silu": True}
        assert_same(step, reference.short_conv_step, given)


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_may_go_unused(used):
    given = inputs(2, 5, 8, 4)
    leaves = [t.clone().requires_grad_() for t in given.values()]
    found = []
    for run in (kernel, reference.short_conv):
        out = run(**dict(zip(given, leaves, strict=True)))[used].square().sum()
        found.append(torch.autograd.grad(out + sum(t.sum() for t in leaves), leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_slices_are_read_where_they_lie():
    wide, weight = randn(2, 9, 100), randn(32, 3, seed=1)
    x = wide[..., 16:48]
    torch.testing.assert_close(kernel(x=x, weight=weight), kernel(x=x.contiguous(), weight=weight))
    swapped = randn(2, 32, 9).transpose(1, 2)  # features not innermost
    torch.testing.assert_close(kernel(x=swapped, weight=weight), kernel(x=swapped.contiguous(), weight=weight))
    with recording() as launches:
        kernel(x=x, weight=weight)
    assert launches[0].arguments["x"].data_ptr() == x.data_ptr()
    assert_same(
        lambda wide, weight: kernel(x=wide[..., 16:48], weight=weight),
        lambda wide, weight: reference.short_conv(wide[..., 16:48], weight),
        {"wide": wide, "weight": weight},
    )


def test_torch_agrees():
    given = inputs(2, 20, 32, 4, state=False)
    x, weight, bias = given.values()
    expected = F.conv1d(x.mT, weight[:, None], bias, padding=3, groups=32)[..., :20].mT
    torch.testing.assert_close(kernel(**given)[0], expected, rtol=1e-4, atol=1e-4)


def test_repeated_runs_agree_to_the_bit():
    given = inputs(2, 70, 40, 4) | {"silu": True}
    first, again = (outputs_and_gradients(kernel, given) for _ in range(2))
    assert all(torch.equal(first[n], g) for n, g in again.items())


def test_torch_accepts_the_operators():
    from archsearch_kernels.short_conv.chunk import short_conv_op
    from archsearch_kernels.short_conv.step import step_inplace_op, step_op

    x, weight, bias, state = inputs(1, 3, 8, 3).values()
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    torch.library.opcheck(short_conv_op, (*leaves, None, True))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with torch.no_grad():
        token = x[:, 0].detach()
        torch.library.opcheck(step_op, (token, weight, None, state.detach(), True), test_utils=tests)
        torch.library.opcheck(step_inplace_op, (token, weight, bias, state.detach().clone(), True), test_utils=tests)


def test_bad_input_is_named():
    x, weight = randn(2, 3, 8), randn(8, 4)
    with pytest.raises(ValueError, match=r"x is \(2, 3\); expected \[B, T, D\]"):
        short_conv(x[..., 0], weight)
    with pytest.raises(ValueError, match=r"weight is \(4, 8\); expected \(8, taps\)"):
        short_conv(x, weight.t())
    with pytest.raises(ValueError, match=r"bias is \(4,\); expected \(8,\)"):
        short_conv(x, weight, randn(4))
    with pytest.raises(ValueError, match=r"state is \(2, 4, 8\); expected \(2, 3, 8\)"):
        short_conv(x, weight, state=randn(2, 4, 8))
    with pytest.raises(ValueError, match=r"seq_idx is torch.int64 \(2, 2\) on \w+; expected integers \(2, 3\)"):
        short_conv(x, weight, seq_idx=torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="cu_seqlens wants one row"):
        short_conv(x, weight, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"x is \(2, 3, 8\); expected \[B, D\] or \[B, 1, D\]"):
        short_conv_step(x, weight, None, randn(2, 3, 8))
    with pytest.raises(ValueError, match="at most 8 taps, not 9"):
        kernel(x=x, weight=randn(8, 9))
    assert short_conv(x, randn(8, 9))[0].shape == x.shape
    with pytest.raises(ValueError, match="does not compute in float64"):
        kernel(x=x.double(), weight=weight)


def launches_of_a_real_size(D=6144, widths=(4,)):
    with recording(dry=True) as launches:
        for W in widths:
            given = inputs(1, 2, D, W, state=False, dtype=torch.bfloat16) | {"silu": True}
            outputs_and_gradients(kernel, given)
            outputs_and_gradients(kernel, given | {"seq_idx": torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)})
            outputs_and_gradients(kernel, inputs(1, 2, D, W, dtype=torch.bfloat16))
            step(**inputs(1, 1, D, W, dtype=torch.bfloat16), silu=True)
    return launches


def test_the_default_configuration_fits_hopper():
    launches = launches_of_a_real_size()
    assert_fits_hopper([*launches[:2], *launches[-2:]])


@pytest.mark.parametrize("W", [pytest.param(w, marks=ON_GPU) for w in (3, 4, 8)])
def test_real_sizes(W):
    given = inputs(2, 4097, 2048, W, dtype=torch.bfloat16) | {"silu": True}
    assert_same(kernel, reference.short_conv, given)
    packed = {n: x for n, x in given.items() if n != "state"} | {"seq_idx": documents(2, 4097)}
    assert_same(kernel, reference.short_conv, packed)
    once = outputs_and_gradients(kernel, given)
    for _ in range(20):
        assert all(torch.equal(once[n], g) for n, g in outputs_and_gradients(kernel, given).items())
