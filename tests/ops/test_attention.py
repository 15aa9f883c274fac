"""Softmax attention against its one-query-at-a-time truth: outputs, gradients, windows, sinks, packed documents."""

import pytest
import torch

from archsearch_kernels.attention import attention, attention_recurrent

CASES = {
    "full": {},
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "wide values": {"value_dim": 24},
    "narrow values": {"value_dim": 4},
    "window": {"window": 7},
    "window 1": {"window": 1},
    "wide window": {"window": 60},
    "window beyond": {"window": 1000},
    "sink": {"sink": True},
    "sink, window, gqa": {"sink": True, "window": 9, "kv_heads": 2},
    "documents": {"documents": True},
    "documents, window": {"documents": True, "window": 6},
    "documents, wide window": {"documents": True, "window": 80},
    "documents, window, sink, gqa": {"documents": True, "window": 6, "sink": True, "kv_heads": 1},
    "scale": {"scale": 0.05},
}


def inputs(
    T, S=None, kv_heads=4, value_dim=8, sink=False, documents=False, dtype=torch.float64, B=2, H=4, D=8, **options
):
    S = S or T
    torch.manual_seed(T)
    tensors = {
        "q": torch.randn(B, T, H, D, dtype=dtype),
        "k": torch.randn(B, S, kv_heads, D, dtype=dtype),
        "v": torch.randn(B, S, kv_heads, value_dim, dtype=dtype),
    }
    if sink:
        tensors["sink"] = torch.randn(H, dtype=dtype)
    if documents:
        options["seq_idx"] = (torch.rand(B, T) < 0.1).long().cumsum(1)
    return {name: x.requires_grad_() for name, x in tensors.items()}, options


def both(tensors, options):
    """Output and all gradients of the fast form and of the truth."""
    results = []
    for form in (attention, attention_recurrent):
        out = form(**tensors, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * weight).sum(), list(tensors.values()))])
    return results


@pytest.mark.parametrize("T", [1, 2, 63, 157])
@pytest.mark.parametrize("case", CASES)
def test_training_form_is_the_truth(case, T):
    fast, truth = both(*inputs(T, **CASES[case]))
    for ours, expected in zip(fast, truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("case", [name for name in CASES if "documents" not in name])
def test_last_queries_of_a_longer_sequence(case, T):
    fast, truth = both(*inputs(T, S=64, **CASES[case]))
    for ours, expected in zip(fast, truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["gqa", "window", "sink, window, gqa", "documents, window"])
def test_bfloat16_is_near_float32(case):
    tensors, options = inputs(100, dtype=torch.float32, **CASES[case])
    exact = attention(**tensors, **options)
    rounded = attention(**{name: x.bfloat16() for name, x in tensors.items()}, **options)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


def test_keys_outside_the_window_are_never_read():
    tensors, _ = inputs(1, S=64, dtype=torch.float32)
    with torch.no_grad():
        expected = attention(**tensors, window=8)
        tensors["k"][:, :56] = torch.nan
        tensors["v"][:, :56] = torch.nan
        torch.testing.assert_close(attention(**tensors, window=8), expected)


def test_a_window_costs_no_square_mask():
    """The largest tensor of a windowed pass grows with T x window, not with T x T."""
    tensors, _ = inputs(256, dtype=torch.float32)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))])
            return out

    with torch.no_grad(), Sizes():
        attention(**tensors, window=8)
    assert largest < 256 * 256
