"""The short convolution against one token and one tap at a time, outputs and gradients."""

import pytest
import torch

from archsearch_kernels.short_conv import short_conv, short_conv_recurrent

CASES = {
    "plain": {},
    "bias, silu": {"bias": True, "silu": True},
    "documents": {"documents": True},
    "documents, bias, silu": {"documents": True, "bias": True, "silu": True},
    "one tap": {"taps": 1},
    "more taps than tokens": {"taps": 9, "bias": True},
}


def inputs(T, taps=4, bias=False, documents=False, dtype=torch.float64, **options):
    B, D = 2, 5
    torch.manual_seed(T)
    tensors = {"x": torch.randn(B, T, D, dtype=dtype), "weight": torch.randn(D, taps, dtype=dtype)}
    if bias:
        tensors["bias"] = torch.randn(D, dtype=dtype)
    if documents:
        options["seq_idx"] = (torch.rand(B, T) < 0.3).long().cumsum(1)
    return {name: x.requires_grad_() for name, x in tensors.items()}, options


def results(y, tensors):
    """Output and all gradients."""
    weighted = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    return [y, *torch.autograd.grad(weighted, list(tensors.values()))]


@pytest.mark.parametrize("T", [1, 2, 3, 20])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_sum_over_taps(case, T):
    tensors, options = inputs(T, **CASES[case])
    fast = results(short_conv(**tensors, **options)[0], tensors)
    for ours, expected in zip(fast, results(short_conv_recurrent(**tensors, **options), tensors), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("split", [[20], [1] * 20, [7, 1, 1, 11], [2, 18]], ids=str)
def test_pieces_carry_the_last_inputs(split, taps):
    tensors, options = inputs(20, taps=taps, bias=True, silu=True)
    whole, last = short_conv(**tensors, **options)
    x = tensors.pop("x")
    outputs, state = [], None
    for piece in x.split(split, dim=1):
        y, state = short_conv(piece, **tensors, **options, state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-10, atol=1e-10)
    assert torch.equal(state, last)
    assert torch.equal(state, x[:, 20 - (taps - 1) :])


def test_half_precision_stays_half():
    tensors, _ = inputs(20, dtype=torch.float32)
    low = {name: x.detach().bfloat16() for name, x in tensors.items()}
    y, state = short_conv(**low)
    assert y.dtype == state.dtype == torch.bfloat16
    expected, _ = short_conv(**{name: x.float() for name, x in low.items()})
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
