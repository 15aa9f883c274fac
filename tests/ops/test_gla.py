"""Gated linear attention: the chunkwise form against the loop over tokens, outputs and gradients."""

import pytest
import torch

from archsearch_kernels.gla import gla, gla_recurrent, gla_step

CASES = {
    "plain": {},
    "state": {"state": True},
    "documents": {"documents": True},
    "documents, state": {"documents": True, "state": True},
    "scale": {"scale": 1.0},
    "chunk 1": {"chunk": 1},
    "chunk 16": {"chunk": 16, "documents": True},
    "chunk 128": {"chunk": 128},
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


def inputs(T, state=False, documents=False, dtype=torch.float64, gate="to -20", **options):
    B, H, K, V = 2, 3, 8, 6
    torch.manual_seed(T)
    tensors = {
        "q": torch.randn(B, T, H, K, dtype=dtype),
        "k": torch.randn(B, T, H, K, dtype=dtype),
        "v": torch.randn(B, T, H, V, dtype=dtype),
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


@pytest.mark.parametrize("T", [1, 2, 63, 64, 128, 157])
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_the_recurrence(case, T):
    tensors, options = inputs(T, **CASES[case])
    fast = results(gla, tensors, options)
    options.pop("chunk", None)
    for ours, expected in zip(fast, results(gla_recurrent, tensors, options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_float32_is_exact_for_any_decay(gate):
    """Errors relative to the largest value (or to 1e-6), gradients too; the truth is the recurrence in float64."""
    tensors, options = inputs(257, gate=gate, dtype=torch.float32, state=True)
    double = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    fast = results(gla, tensors, options)
    for ours, expected in zip(fast, results(gla_recurrent, double, options), strict=True):
        assert (ours.double() - expected).abs().max() <= 3e-6 * expected.abs().max().clamp(min=1e-6)


def test_every_pair_of_tokens_is_met_once():
    """Scores written out: sum over features of q_i k_j exp(the gates from j + 1 to i)."""
    tensors, _ = inputs(64)
    q, k, v, g = tensors.values()
    since = g.cumsum(1)
    decay = (since[:, :, None] - since[:, None]).exp()  # [B, i, j, H, K]; float64, gates of 64 tokens do not overflow
    scores = torch.einsum("bihk,bjhk,bijhk->bhij", q, k, decay).tril() * 8**-0.5
    torch.testing.assert_close(gla(**tensors)[0], torch.einsum("bhij,bjhv->bihv", scores, v), rtol=1e-9, atol=1e-9)


def test_pieces_and_steps_carry_the_state():
    tensors, _ = inputs(100)
    o, final = gla(**tensors)
    first, state = gla(**{n: x[:, :37] for n, x in tensors.items()})
    second, state = gla(**{n: x[:, 37:90] for n, x in tensors.items()}, initial_state=state)
    outputs = [first, second]
    for t in range(90, 100):
        row, state = gla_step(**{n: x[:, t] for n, x in tensors.items()}, state=state)
        outputs.append(row[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), o, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_later_tokens_and_other_documents_do_not_matter():
    tensors, _ = inputs(100)
    seq_idx = (torch.arange(100) >= 41).long().expand(2, 100)
    o, _ = gla(**tensors, seq_idx=seq_idx)
    changed = {n: torch.cat([x[:, :70], 1e6 * x[:, 70:]], 1) if n in "kv" else x for n, x in tensors.items()}
    assert torch.equal(gla(**changed, seq_idx=seq_idx)[0][:, :70], o[:, :70])
    changed = {n: torch.cat([1e6 * x[:, :41], x[:, 41:]], 1) if n in "kv" else x for n, x in tensors.items()}
    assert torch.equal(gla(**changed, seq_idx=seq_idx)[0][:, 41:], o[:, 41:])


def test_half_precision_computes_in_float32():
    tensors, _ = inputs(100, dtype=torch.float32, gate="usual")
    low = {n: x if n == "g" else x.bfloat16() for n, x in tensors.items()}
    o, state = gla(**low)
    expected, expected_state = gla(**{n: x.float() for n, x in low.items()})
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected.bfloat16())
    assert torch.equal(state, expected_state)
    with torch.autocast("cpu", torch.bfloat16):
        within = gla(**tensors)
    for inside, outside in zip(within, gla(**tensors), strict=True):
        assert torch.equal(inside, outside)


def test_a_chunk_is_a_power_of_two():
    tensors, _ = inputs(100)
    with pytest.raises(ValueError, match="chunk 0 is not a power of two"):
        gla(**tensors, chunk=0)
