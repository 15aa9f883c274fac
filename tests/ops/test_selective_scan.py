"""The selective scan: the chunked form and its hand-written backward pass against the loop over tokens."""

import pytest
import torch

from archsearch_kernels.selective_scan.reference import (
    selective_scan,
    selective_scan_recurrent,
    selective_scan_step,
)

CASES = {
    "plain": {},
    "state": {"state": True},
    "documents": {"documents": True},
    "documents, state": {"documents": True, "state": True},
    "chunk 1": {"chunk": 1, "documents": True},
    "chunk 7": {"chunk": 7, "state": True},
    "chunk beyond": {"chunk": 1000},
}
RATES = {"none": 0.0, "nearly none": 1e-6, "usual": 1.0, "20": 20.0, "1000": 1000.0}


def inputs(T, state=False, documents=False, dtype=torch.float64, rate=20.0, **options):
    B, D, N = 2, 6, 4
    torch.manual_seed(T)
    tensors = {
        "x": torch.randn(B, T, D, dtype=dtype),
        "dt": torch.rand(B, T, D, dtype=dtype),
        "a": -rate * torch.rand(D, N, dtype=dtype),
        "b": torch.randn(B, T, N, dtype=dtype),
        "c": torch.randn(B, T, N, dtype=dtype),
    }
    if state:
        tensors["initial_state"] = torch.randn(B, N, D, dtype=dtype)
    if documents:
        options["seq_idx"] = (torch.rand(B, T) < 0.05).long().cumsum(1)
    return {name: x.requires_grad_() for name, x in tensors.items()}, options


def results(form, tensors, options):
    """Output, final state and all gradients."""
    y, state = form(**tensors, **options)
    weighted = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() + state.square().sum()
    return [y, state, *torch.autograd.grad(weighted, list(tensors.values()))]


@pytest.mark.parametrize("T", [1, 2, 63, 64, 100, 257])
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_the_recurrence(case, T):
    tensors, options = inputs(T, **CASES[case])
    fast = results(selective_scan, tensors, options)
    options.pop("chunk", None)
    for ours, expected in zip(fast, results(selective_scan_recurrent, tensors, options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rate", RATES)
def test_float32_is_exact_for_any_decay(rate):
    """Errors relative to the largest value (or to 1e-6), gradients too; the truth is the recurrence in float64."""
    tensors, options = inputs(257, rate=RATES[rate], dtype=torch.float32, state=True)
    double = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    fast = results(selective_scan, tensors, options)
    for ours, expected in zip(fast, results(selective_scan_recurrent, double, options), strict=True):
        assert (ours.double() - expected).abs().max() <= 3e-6 * expected.abs().max().clamp(min=1e-6)


def test_only_what_needs_a_gradient_has_one():
    tensors, _ = inputs(100)
    frozen = {name: x.detach() for name, x in tensors.items()}
    whole = torch.autograd.grad(selective_scan(**tensors)[0].sum(), list(tensors.values()))
    for name, expected in zip(tensors, whole, strict=True):
        y, state = selective_scan(**{**frozen, name: tensors[name]})
        torch.testing.assert_close(torch.autograd.grad(y.sum(), tensors[name])[0], expected)
    y, state = selective_scan(**frozen)
    assert not y.requires_grad
    assert not state.requires_grad


def test_pieces_and_steps_carry_the_state():
    tensors, _ = inputs(100)
    y, final = selective_scan(**tensors)

    def part(at):
        return {n: x if n == "a" else x[:, at] for n, x in tensors.items()}

    first, state = selective_scan(**part(slice(0, 37)))
    second, state = selective_scan(**part(slice(37, 90)), initial_state=state)
    outputs = [first, second]
    for t in range(90, 100):
        row, state = selective_scan_step(**part(t), state=state)
        outputs.append(row[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_later_tokens_and_other_documents_do_not_matter():
    tensors, _ = inputs(100)
    seq_idx = (torch.arange(100) >= 41).long().expand(2, 100)
    y, _ = selective_scan(**tensors, seq_idx=seq_idx)
    changed = {n: torch.cat([x[:, :70], 1e6 * x[:, 70:]], 1) if n in "xb" else x for n, x in tensors.items()}
    assert torch.equal(selective_scan(**changed, seq_idx=seq_idx)[0][:, :70], y[:, :70])
    changed = {n: torch.cat([1e6 * x[:, :41], x[:, 41:]], 1) if n in "xb" else x for n, x in tensors.items()}
    assert torch.equal(selective_scan(**changed, seq_idx=seq_idx)[0][:, 41:], y[:, 41:])


def test_half_precision_computes_in_float32():
    tensors, _ = inputs(100, dtype=torch.float32, rate=1.0)
    low = {n: x.bfloat16() if n in "xbc" else x for n, x in tensors.items()}
    y, state = selective_scan(**low)
    expected, expected_state = selective_scan(**{n: x.float() for n, x in low.items()})
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, expected.bfloat16())
    assert torch.equal(state, expected_state)
    with torch.autocast("cpu", torch.bfloat16):
        within = results(selective_scan, tensors, {})
    for inside, outside in zip(within, results(selective_scan, tensors, {}), strict=True):
        assert torch.equal(inside, outside)
