"""Kimi delta attention: the chunkwise form against the loop over tokens, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F

from archsearch_kernels.delta_rule import delta_rule_recurrent
from archsearch_kernels.kda import kda, kda_recurrent, kda_step

CASES = {
    "plain": {},
    "state": {"state": True},
    "documents": {"documents": True},
    "documents, state": {"documents": True, "state": True},
    "scale": {"scale": 1.0},
    "chunk 1": {"chunk": 1},
    "chunk 16": {"chunk": 16, "documents": True},
    "chunk 64": {"chunk": 64},
}
GATES = {
    "none": lambda shape: torch.zeros(shape),
    "nearly none": lambda shape: -1e-6 * torch.rand(shape),
    "usual": lambda shape: -0.1 * torch.rand(shape),
    "-20": lambda shape: torch.full(shape, -20.0),
    "to -20": lambda shape: -20 * torch.rand(shape),
    "-20 or none": lambda shape: torch.where(torch.rand(shape) < 0.5, -20.0, -1e-6),
    "features from 0 to -20": lambda shape: -torch.linspace(0, 20, shape[-1]).expand(shape).clone(),
    "to -1000": lambda shape: -1000 * torch.rand(shape),
}


def inputs(T, state=False, documents=False, dtype=torch.float64, gate="usual", **options):
    B, H, K, V = 2, 3, 8, 6
    torch.manual_seed(T)
    tensors = {
        "q": F.normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1),
        "k": F.normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1),
        "v": torch.randn(B, T, H, V, dtype=dtype),
        "beta": torch.rand(B, T, H, dtype=dtype),
        "g": GATES[gate]((B, T, H, K)).to(dtype),
    }
    if state:
        tensors["initial_state"] = torch.randn(B, H, K, V, dtype=dtype)
    if documents:
        options["seq_idx"] = (torch.rand(B, T) < 0.05).long().cumsum(1)
    return {name: x.requires_grad_() for name, x in tensors.items()}, options


def results(form, tensors, options):
    """Output, final state and all gradients."""
    o, state = form(**tensors, **options)
    weighted = (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() + state.square().sum()
    return [o, state, *torch.autograd.grad(weighted, list(tensors.values()))]


@pytest.mark.parametrize("T", [1, 2, 63, 64, 157])
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_the_recurrence(case, T):
    tensors, options = inputs(T, **CASES[case])
    fast = results(kda, tensors, options)
    options.pop("chunk", None)
    for ours, expected in zip(fast, results(kda_recurrent, tensors, options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_float32_is_exact_for_any_decay(gate):
    """Errors relative to the largest value (or to 1e-6), gradients too; the truth is the recurrence in float64."""
    tensors, options = inputs(257, gate=gate, dtype=torch.float32, state=True)
    double = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    fast = results(kda, tensors, options)
    for ours, expected in zip(fast, results(kda_recurrent, double, options), strict=True):
        assert (ours.double() - expected).abs().max() <= 3e-6 * expected.abs().max().clamp(min=1e-6)


def test_the_recurrence_is_the_papers():
    """S = (I - b k k^T) Diag(a) S + b k v^T (2510.26692, equation 1), written with full matrices."""
    tensors, _ = inputs(5)
    q, k, v, beta, g = (x[0, :, 0] for x in tensors.values())
    state = torch.zeros(8, 6, dtype=torch.float64)
    for t in range(5):
        erase = torch.eye(8, dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
        state = erase @ torch.diag(g[t].exp()) @ state + beta[t] * torch.outer(k[t], v[t])
        torch.testing.assert_close(kda_recurrent(**tensors)[0][0, t, 0], 8**-0.5 * q[t] @ state)


def test_equal_decays_are_the_gated_delta_rule():
    tensors, _ = inputs(100, state=True)
    g = tensors["g"][..., :1]
    o, state = kda(**{**tensors, "g": g.expand_as(tensors["g"])})
    expected, expected_state = delta_rule_recurrent(**{**tensors, "g": g.squeeze(-1)})
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, expected_state, rtol=1e-10, atol=1e-10)


def test_pieces_and_steps_carry_the_state():
    tensors, _ = inputs(100)
    o, final = kda(**tensors)
    first, state = kda(**{n: x[:, :37] for n, x in tensors.items()})
    second, state = kda(**{n: x[:, 37:90] for n, x in tensors.items()}, initial_state=state)
    outputs = [first, second]
    for t in range(90, 100):
        row, state = kda_step(**{n: x[:, t] for n, x in tensors.items()}, state=state)
        outputs.append(row[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), o, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_later_tokens_and_other_documents_do_not_matter():
    tensors, _ = inputs(100)
    seq_idx = (torch.arange(100) >= 41).long().expand(2, 100)
    o, _ = kda(**tensors, seq_idx=seq_idx)
    changed = {n: torch.cat([x[:, :70], 1e6 * x[:, 70:]], 1) if n in "qv" else x for n, x in tensors.items()}
    assert torch.equal(kda(**changed, seq_idx=seq_idx)[0][:, :70], o[:, :70])
    changed = {n: torch.cat([1e6 * x[:, :41], x[:, 41:]], 1) if n in "qv" else x for n, x in tensors.items()}
    assert torch.equal(kda(**changed, seq_idx=seq_idx)[0][:, 41:], o[:, 41:])


def test_half_precision_computes_in_float32():
    tensors, _ = inputs(100, dtype=torch.float32)
    low = {n: x if n in ("beta", "g") else x.bfloat16() for n, x in tensors.items()}
    o, state = kda(**low)
    expected, expected_state = kda(**{n: x.float() for n, x in low.items()})
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected.bfloat16())
    assert torch.equal(state, expected_state)
    with torch.autocast("cpu", torch.bfloat16):
        within = kda(**tensors)
    for inside, outside in zip(within, kda(**tensors), strict=True):
        assert torch.equal(inside, outside)
