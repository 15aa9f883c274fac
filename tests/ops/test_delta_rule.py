"""The delta rule, with and without decay: the chunkwise form against the loop over tokens, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F

from archsearch_kernels.delta_rule import delta_rule, delta_rule_recurrent, delta_rule_step
from archsearch_kernels.delta_rule.reference import unit_lower_inverse

CASES = {
    "plain": {"gate": None},
    "decay": {},
    "state": {"state": True},
    "documents": {"documents": True},
    "documents, no decay": {"documents": True, "gate": None},
    "documents, state": {"documents": True, "state": True},
    "value groups": {"groups": 2},
    "value groups, no decay, state": {"groups": 4, "gate": None, "state": True},
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
    "to -1000": lambda shape: -1000 * torch.rand(shape),
}


def inputs(T, state=False, documents=False, dtype=torch.float64, gate="usual", groups=1, **options):
    B, H, K, V = 2, 4, 8, 6
    torch.manual_seed(T)
    tensors = {
        "q": F.normalize(torch.randn(B, T, H // groups, K, dtype=dtype), dim=-1),
        "k": F.normalize(torch.randn(B, T, H // groups, K, dtype=dtype), dim=-1),
        "v": torch.randn(B, T, H, V, dtype=dtype),
        "beta": 2 * torch.rand(B, T, H, dtype=dtype),
    }
    if gate is not None:
        tensors["g"] = GATES[gate]((B, T, H)).to(dtype)
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
    fast = results(delta_rule, tensors, options)
    options.pop("chunk", None)
    for ours, expected in zip(fast, results(delta_rule_recurrent, tensors, options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_float32_is_exact_for_any_decay(gate):
    """Errors relative to the largest value (or to 1e-6), gradients too; the truth is the recurrence in float64."""
    tensors, options = inputs(257, gate=gate, dtype=torch.float32, state=True)
    double = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    fast = results(delta_rule, tensors, options)
    for ours, expected in zip(fast, results(delta_rule_recurrent, double, options), strict=True):
        assert (ours.double() - expected).abs().max() <= 3e-6 * expected.abs().max().clamp(min=1e-6)


def test_the_recurrence_is_the_papers():
    """S = a (I - b k k^T) S + b k v^T (2412.06464, equation 10), written with full matrices."""
    tensors, _ = inputs(5)
    q, k, v, beta, g = (x[0, :, 0] for x in tensors.values())
    state = torch.zeros(8, 6, dtype=torch.float64)
    for t in range(5):
        erase = torch.eye(8, dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
        state = g[t].exp() * erase @ state + beta[t] * torch.outer(k[t], v[t])
        torch.testing.assert_close(delta_rule_recurrent(**tensors)[0][0, t, 0], 8**-0.5 * q[t] @ state)


def test_a_full_step_replaces_what_a_key_recalls():
    k = F.normalize(torch.randn(1, 50, 2, 8, dtype=torch.float64), dim=-1)
    v = torch.randn(1, 50, 2, 6, dtype=torch.float64)
    o, _ = delta_rule(k, k, v, torch.ones(1, 50, 2, dtype=torch.float64), scale=1.0)
    torch.testing.assert_close(o, v, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("beta", "error"), [(1.0, 1e-6), (1.9, 2e-5)])
def test_the_same_key_again_and_again(beta, error):
    """The hardest triangles, full of ones or 1.9s; 1.9 mirrors what is recalled, so that rounding dies out slowly."""
    torch.manual_seed(0)
    k = F.normalize(torch.ones(1, 200, 1, 8), dim=-1)
    v = torch.randn(1, 200, 1, 6)
    arguments = (k, k, v, torch.full((1, 200, 1), beta))
    truth, _ = delta_rule_recurrent(*(x.double() for x in arguments))
    for chunk in (32, 64):
        o, _ = delta_rule(*arguments, chunk=chunk)
        assert (o - truth).abs().max() <= error * truth.abs().max()


@pytest.mark.parametrize("C", [1, 2, 8, 64])
def test_unit_lower_inverse(C):
    """Against torch's, with its gradient; what stands on or above the diagonal does not matter."""
    torch.manual_seed(C)
    a = (0.3 * torch.randn(5, C, C, dtype=torch.float64)).requires_grad_()  # larger ones have inverses beyond 1e9
    weight = torch.randn(5, C, C, dtype=torch.float64)
    pairs = []
    for inverse in (unit_lower_inverse(a), torch.linalg.inv(torch.eye(C, dtype=a.dtype) + a.tril(-1))):
        pairs.append((inverse, *torch.autograd.grad((inverse * weight).sum(), a)))
    for ours, expected in zip(*pairs, strict=True):
        assert (ours - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("groups", [1, 2])
def test_pieces_and_steps_carry_the_state(groups):
    tensors, _ = inputs(100, groups=groups)
    o, final = delta_rule(**tensors)
    first, state = delta_rule(**{n: x[:, :37] for n, x in tensors.items()})
    second, state = delta_rule(**{n: x[:, 37:90] for n, x in tensors.items()}, initial_state=state)
    outputs = [first, second]
    for t in range(90, 100):
        row, state = delta_rule_step(**{n: x[:, t] for n, x in tensors.items()}, state=state)
        outputs.append(row[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), o, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", [None, "usual"])
def test_later_tokens_and_other_documents_do_not_matter(gate):
    tensors, _ = inputs(100, gate=gate)
    seq_idx = (torch.arange(100) >= 41).long().expand(2, 100)
    o, _ = delta_rule(**tensors, seq_idx=seq_idx)
    changed = {n: torch.cat([x[:, :70], 1e6 * x[:, 70:]], 1) if n in "qv" else x for n, x in tensors.items()}
    assert torch.equal(delta_rule(**changed, seq_idx=seq_idx)[0][:, :70], o[:, :70])
    changed = {n: torch.cat([1e6 * x[:, :41], x[:, 41:]], 1) if n in "qv" else x for n, x in tensors.items()}
    assert torch.equal(delta_rule(**changed, seq_idx=seq_idx)[0][:, 41:], o[:, 41:])


def test_half_precision_computes_in_float32():
    tensors, _ = inputs(100, dtype=torch.float32)
    low = {n: x if n in ("beta", "g") else x.bfloat16() for n, x in tensors.items()}
    o, state = delta_rule(**low)
    expected, expected_state = delta_rule(**{n: x.float() for n, x in low.items()})
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected.bfloat16())
    assert torch.equal(state, expected_state)
    with torch.autocast("cpu", torch.bfloat16):
        within = delta_rule(**tensors)
    for inside, outside in zip(within, delta_rule(**tensors), strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("chunk", [0, 48])
def test_a_chunk_is_a_power_of_two(chunk):
    tensors, _ = inputs(100)
    with pytest.raises(ValueError, match=f"chunk {chunk} is not a power of two"):
        delta_rule(**tensors, chunk=chunk)
