"""Linear attention with scalar decay: the chunkwise form against the loop over tokens, outputs and gradients."""

import pytest
import torch

from archsearch_kernels.gla import gla
from archsearch_kernels.scalar_decay import scalar_decay, scalar_decay_recurrent, scalar_decay_step

LENGTHS = [1, 2, 63, 64, 128, 157]
CASES = {
    "data decay": {},
    "fixed decay": {"fixed": True},
    "groups": {"groups": 2},
    "one group": {"groups": 1, "fixed": True},
    "state": {"state": True},
    "fixed decay, state": {"fixed": True, "state": True},
    "documents": {"documents": True, "groups": 2},
    "fixed decay, documents, state": {"fixed": True, "documents": True, "state": True},
    "scale": {"scale": 1.0},
    "chunk 1": {"chunk": 1},
    "chunk 16": {"chunk": 16, "groups": 2, "documents": True},
}
GATES = {
    "none": lambda shape: torch.zeros(shape),
    "nearly none": lambda shape: -1e-6 * torch.rand(shape),
    "usual": lambda shape: -torch.rand(shape),
    "-20": lambda shape: torch.full(shape, -20.0),
    "to -20": lambda shape: -20 * torch.rand(shape),
    "-20 or none": lambda shape: torch.where(torch.rand(shape) < 0.5, -20.0, -1e-6),
    "to -1000": lambda shape: -1000 * torch.rand(shape),
}


def inputs(T, groups=4, fixed=False, state=False, documents=False, dtype=torch.float64, gate="to -20", **options):
    B, H, K, V = 2, 4, 8, 6
    torch.manual_seed(T)
    tensors = {
        "q": torch.randn(B, T, groups, K, dtype=dtype),
        "k": torch.randn(B, T, groups, K, dtype=dtype),
        "v": torch.randn(B, T, H, V, dtype=dtype),
        "g": GATES[gate]((H,) if fixed else (B, T, H)).to(dtype),
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


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_the_recurrence(case, T):
    tensors, options = inputs(T, **CASES[case])
    fast = results(scalar_decay, tensors, options)
    options.pop("chunk", None)
    for ours, expected in zip(fast, results(scalar_decay_recurrent, tensors, options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fixed", [False, True], ids=["data", "fixed"])
@pytest.mark.parametrize("gate", GATES)
def test_float32_is_exact_for_any_decay(gate, fixed):
    """Errors relative to the largest value (or to 1e-6), gradients too; the truth is the recurrence in float64."""
    tensors, options = inputs(257, gate=gate, fixed=fixed, dtype=torch.float32, state=True)
    double = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    fast = results(scalar_decay, tensors, options)
    for ours, expected in zip(fast, results(scalar_decay_recurrent, double, options), strict=True):
        assert (ours.double() - expected).abs().max() <= 3e-6 * expected.abs().max().clamp(min=1e-6)


def test_without_decay_it_is_causal_linear_attention():
    tensors, _ = inputs(100, gate="none")
    q, k, v = (tensors[name] for name in "qkv")
    scores = torch.einsum("bihk,bjhk->bhij", q, k).tril() * 8**-0.5
    torch.testing.assert_close(scalar_decay(**tensors)[0], torch.einsum("bhij,bjhv->bihv", scores, v))


def test_it_is_gla_with_equal_gates():
    tensors, _ = inputs(100)
    same = {**tensors, "g": tensors["g"][..., None].expand(-1, -1, -1, 8)}
    for ours, expected in zip(scalar_decay(**tensors), gla(**same), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fixed", [False, True], ids=["data", "fixed"])
def test_pieces_and_steps_carry_the_state(fixed):
    tensors, _ = inputs(100, groups=2, fixed=fixed)
    o, final = scalar_decay(**tensors)

    def part(a, b):
        return {n: x if x.dim() == 1 else x[:, a:b] for n, x in tensors.items()}

    first, state = scalar_decay(**part(0, 37))
    second, state = scalar_decay(**part(37, 90), initial_state=state)
    outputs = [first, second]
    for t in range(90, 100):
        token = {n: x if x.dim() == 1 else x[:, 0] for n, x in part(t, t + 1).items()}
        row, state = scalar_decay_step(**token, state=state)
        outputs.append(row[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), o, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_later_tokens_and_other_documents_do_not_matter():
    tensors, _ = inputs(100)
    seq_idx = (torch.arange(100) >= 41).long().expand(2, 100)
    o, _ = scalar_decay(**tensors, seq_idx=seq_idx)
    changed = {n: torch.cat([x[:, :70], 1e6 * x[:, 70:]], 1) if n in "kv" else x for n, x in tensors.items()}
    assert torch.equal(scalar_decay(**changed, seq_idx=seq_idx)[0][:, :70], o[:, :70])
    changed = {n: torch.cat([1e6 * x[:, :41], x[:, 41:]], 1) if n in "kv" else x for n, x in tensors.items()}
    assert torch.equal(scalar_decay(**changed, seq_idx=seq_idx)[0][:, 41:], o[:, 41:])


def test_half_precision_computes_in_float32():
    tensors, _ = inputs(100, dtype=torch.float32, gate="usual")
    low = {n: x if n == "g" else x.bfloat16() for n, x in tensors.items()}
    o, state = scalar_decay(**low)
    expected, expected_state = scalar_decay(**{n: x.float() for n, x in low.items()})
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected.bfloat16())
    assert torch.equal(state, expected_state)
    with torch.autocast("cpu", torch.bfloat16):
        within = scalar_decay(**tensors)
    for inside, outside in zip(within, scalar_decay(**tensors), strict=True):
        assert torch.equal(inside, outside)


def test_a_chunk_is_a_power_of_two():
    tensors, _ = inputs(100)
    with pytest.raises(ValueError, match="chunk 48 is not a power of two"):
        scalar_decay(**tensors, chunk=48)
