"""The delta rule's kernels against the reference: outputs, gradients, packed rows, states, one token."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    DEVICE,
    LENGTHS,
    ON_GPU,
    assert_fits_hopper,
    assert_same,
    error,
    outputs_and_gradients,
    randn,
)

from archsearch_kernels import delta_rule as public
from archsearch_kernels.delta_rule import delta_rule_recurrent
from archsearch_kernels.launch import recording

pytest.importorskip("triton")
delta_rule = partial(public.delta_rule, implementation="triton")
delta_rule_step = partial(public.delta_rule_step, implementation="triton")
reference = partial(public.delta_rule, implementation="reference")


def inputs(T, B=1, H=2, G=None, K=16, V=16, gate=0.2, state=False, dtype=torch.float32):
    """Unit keys, steps in (0, 2), log decays in (-gate, 0)."""
    tensors = {
        "q": F.normalize(randn(B, T, G or H, K, seed=1), dim=-1).to(dtype),
        "k": F.normalize(randn(B, T, G or H, K, seed=2), dim=-1).to(dtype),
        "v": randn(B, T, H, V, seed=3, dtype=dtype),
        "beta": 2 * randn(B, T, H, seed=4).sigmoid(),
    }
    if gate:
        tensors["g"] = -gate * randn(B, T, H, seed=5).sigmoid()
    if state:
        tensors["initial_state"] = randn(B, H, K, V, seed=6)
    return tensors


def documents(B, T, seed=0, every=40):
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / every
    return starts.int().cumsum(1, dtype=torch.int32).to(DEVICE)


@pytest.mark.parametrize("T", LENGTHS)
def test_outputs_and_gradients(T):
    assert_same(delta_rule, reference, inputs(T, state=True))


@pytest.mark.parametrize(
    "options",
    [
        {"gate": 0},
        {"gate": 0, "state": True, "B": 2},
        {"H": 4, "G": 2, "V": 32},
        {"H": 3, "G": 1, "gate": 0},
        {"K": 48, "V": 80},
        {"K": 24, "V": 20, "state": True},
    ],
)
def test_shapes(options):
    assert_same(delta_rule, reference, inputs(100, **options))


@pytest.mark.parametrize("chunk", [1, 16, 32, 128])
def test_chunks_change_nothing(chunk):
    assert_same(partial(delta_rule, chunk=chunk), reference, inputs(70, state=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", [0, 0.2])
def test_half_precision(dtype, gate):
    assert_same(delta_rule, reference, inputs(150, K=64, V=64, gate=gate, state=True, dtype=dtype))


def test_strong_decays():
    assert_same(delta_rule, reference, inputs(100, gate=20.0, state=True), tolerance=5e-4)


def test_decays_beyond_float32():
    """e^-1000 is 0, and so is its gradient: what is left of it is the rounding of terms that cancel."""
    tensors = inputs(100, gate=1000.0, state=True)
    found, expected = outputs_and_gradients(delta_rule, tensors), outputs_and_gradients(reference, tensors)
    apart = (found.pop("gradient of g") - expected.pop("gradient of g")).abs().max()
    assert apart < (2e-6 if DEVICE == "cpu" else 2e-3)
    assert max(error(found[n], expected[n]) for n in found) < (1e-4 if DEVICE == "cpu" else 2e-3)


def test_decays_that_forget_everything():
    tensors = inputs(100, state=True)
    tensors["g"] = torch.where(randn(1, 100, 2, seed=9) > 1, -torch.inf, tensors["g"])
    for got, expected in zip(delta_rule(**tensors), reference(**tensors), strict=True):
        assert error(got, expected) < (1e-4 if DEVICE == "cpu" else 2e-3)


def test_no_step_has_a_gradient():
    """beta 0 writes nothing and still wants to know what a step would bring."""
    tensors = inputs(100, state=True)
    tensors["beta"] = tensors["beta"] * (randn(1, 100, 2, seed=9) > 0)
    assert_same(delta_rule, reference, tensors)


def test_the_same_key_again_and_again():
    """The hardest triangles: full of steps of 1.9."""
    tensors = inputs(130, gate=0)
    tensors["k"] = F.normalize(torch.ones_like(tensors["k"]), dim=-1)
    tensors["beta"] = torch.full_like(tensors["beta"], 1.9)
    assert_same(delta_rule, reference, tensors, tolerance=5e-4 if DEVICE == "cpu" else 1e-2)


@pytest.mark.parametrize("gate", [0, 0.2])
def test_packed_documents(gate):
    assert_same(
        partial(delta_rule, seq_idx=documents(2, 200)),
        partial(reference, seq_idx=documents(2, 200)),
        inputs(200, B=2, gate=gate, state=True),
    )


def test_packed_is_separate():
    tensors = inputs(150)
    lengths = [0, 64, 70, 150]
    bounds = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    packed = outputs_and_gradients(partial(lambda **x: delta_rule(**x)[0], cu_seqlens=bounds), tensors)

    def one_by_one(**x):
        pieces = [{n: t[:, a:b] for n, t in x.items()} for a, b in pairwise(lengths)]
        return torch.cat([delta_rule(**piece)[0] for piece in pieces], dim=1)

    for name, expected in outputs_and_gradients(one_by_one, tensors).items():
        assert error(packed[name], expected) < (1e-5 if DEVICE == "cpu" else 2e-3)


def test_views_are_taken_as_they_are():
    tensors = inputs(70)
    qkv = torch.cat([tensors[n].flatten(2) for n in "qkv"], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
    views = dict(zip("qkv", (x.unflatten(2, (2, 16)) for x in qkv.split(32, dim=-1)), strict=True))
    spread = torch.empty(1, 70, 2, 32, device=DEVICE)[..., ::2].copy_(tensors["v"])
    for v in (views["v"], spread):
        got = delta_rule(**{**tensors, **views, "v": v, "g": tensors["g"].transpose(1, 2).contiguous().transpose(1, 2)})
        for ours, expected in zip(got, delta_rule(**tensors), strict=True):
            assert torch.equal(ours, expected)


def test_types_may_differ():
    """Unit keys in float32 beside values in bfloat16, as mixers have them under autocast."""
    tensors = inputs(70)
    mixed = {**tensors, "v": tensors["v"].bfloat16(), "beta": tensors["beta"].bfloat16()}
    found = outputs_and_gradients(delta_rule, mixed)
    expected = outputs_and_gradients(reference, mixed)
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in expected.items()}
    assert max(error(found[n], expected[n]) for n in found) < 1.5e-2


def test_against_the_recurrence_and_only_one_output():
    tensors = inputs(67)
    assert_same(lambda **x: delta_rule(**x)[0], lambda **x: delta_rule_recurrent(**x)[0], tensors)
    tensors.pop("q")
    q = inputs(67)["q"]  # the final state knows nothing of q

    def last(form):
        return lambda **x: form(q.to(x["k"].dtype), **x)[1]

    assert_same(last(delta_rule), last(delta_rule_recurrent), tensors)


def test_against_flash_linear_attention():
    """fla's naive form, from the same paper."""
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    tensors = inputs(67)
    expected = naive(**tensors)[0]
    assert error(delta_rule(**tensors)[0], expected) < (1e-5 if DEVICE == "cpu" else 2e-3)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gate", [0, 0.2])
def test_steps_are_the_forward(groups, gate):
    tensors = inputs(12, B=2, H=4, G=4 // groups, K=24, V=40, gate=gate)
    o, final = reference(**tensors)
    state = randn(2, 4, 24, 40) * 0
    kept = torch.zeros_like(state)
    for t in range(12):
        token = {n: x[:, t] for n, x in tensors.items()}
        token.setdefault("g", None)
        row, state = delta_rule_step(**token, state=state)
        again, same = delta_rule_step(**token, state=kept, inplace=True)
        assert same is kept
        assert torch.equal(state, kept)
        assert torch.equal(row, again)
        assert error(row, o[:, t]) < 1e-5
    assert error(state, final) < 1e-5


def test_reference_step_in_place():
    token = {n: x[:, 0] for n, x in inputs(1).items()}
    state = randn(1, 2, 16, 16)
    expected = public.delta_rule_step(**token, state=state, implementation="reference")
    o, kept = public.delta_rule_step(**token, state=state, inplace=True, implementation="reference")
    assert kept is state
    assert torch.equal(kept, expected[1])
    assert torch.equal(o, expected[0])


def test_a_step_that_needs_gradients():
    token = {n: x[:, 0].requires_grad_() for n, x in inputs(1).items()}
    with pytest.raises(ValueError, match="the kernel of one token has no gradient"):
        delta_rule_step(**token, state=randn(1, 2, 16, 16))


def test_operators():
    """What torch demands of an operator: schema, shapes without data, gradients."""
    from archsearch_kernels.delta_rule import chunk, step

    x = {n: t.requires_grad_() for n, t in inputs(20, state=True).items()}
    args = (*(x[n] for n in ("q", "k", "v", "beta", "g", "initial_state")), documents(1, 20), 0.25, 32)
    torch.library.opcheck(chunk._forward, args)
    plain = (*(x[n].detach() for n in ("q", "k", "v", "beta")), None, None, None)
    *_, inverse, reads, since, until = chunk._forward(*plain, 0.25, 32)
    torch.library.opcheck(chunk._backward, (*plain, inverse, reads, since, until, randn(1, 20, 2, 16), None, 0.25, 32))
    token = [t[:, 0].contiguous() for t in plain[:4]]
    for op in (step._step, step._update):
        torch.library.opcheck(op, (*token, None, None, None, randn(1, 2, 16, 16), 0.25, 1.0, False))
        raw = (randn(1, 2), randn(2), randn(2))
        torch.library.opcheck(op, (*token, *raw, randn(1, 2, 16, 16), 0.25, 2.0, True))


@pytest.mark.parametrize("T", [1, 61, 100])
def test_one_or_two_chunks_of_one_head_in_half_precision(T):
    assert_same(delta_rule, reference, inputs(T, B=2, H=1, K=64, V=64, state=True, dtype=torch.bfloat16))


def test_repeats_bit_for_bit():
    runs = [outputs_and_gradients(delta_rule, inputs(100, H=4, G=2, state=True)) for _ in range(2)]
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name


@pytest.mark.parametrize("C", [16, 32, 64])
def test_unit_lower_inverse(C):
    """The helper alone: dense triangles, and one full of 1.9; the upper part is not read."""
    import triton
    import triton.language as tl

    from archsearch_kernels.delta_rule.kernels.inverse import unit_lower_inverse

    a = randn(3, C, C, scale=0.3)
    a[1] = 1.9
    x = torch.empty_like(a)
    inverse = _inverse_kernel(triton, tl, unit_lower_inverse)
    inverse[(3,)](a, x, C=C)
    expected = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + a.double().cpu().tril(-1))
    assert error(x, expected) < (1e-5 if DEVICE == "cpu" else 1e-4)


def _inverse_kernel(triton, tl, unit_lower_inverse):
    globals().update(tl=tl, unit_lower_inverse=unit_lower_inverse)

    @triton.jit
    def invert(a, x, C: tl.constexpr):
        i = tl.arange(0, C)
        at = tl.program_id(0) * C * C + i[:, None] * C + i[None, :]
        tl.store(x + at, unit_lower_inverse(tl.load(a + at), C))

    return invert


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": randn(1, 5, 32)}, r"v has shape \(1, 5, 32\); expected \[B, T, H, V\]"),
        ({"k": randn(1, 5, 3, 16)}, r"k has shape \(1, 5, 3, 16\); expected \[B, T, G, K\].*dividing 2 heads"),
        ({"q": randn(1, 5, 2, 8)}, r"q has shape \(1, 5, 2, 8\); expected k's, \(1, 5, 2, 16\)"),
        ({"beta": randn(1, 5, 1)}, r"beta has shape \(1, 5, 1\); expected \(1, 5, 2\)"),
        ({"g": randn(1, 4, 2)}, r"g has shape \(1, 4, 2\)"),
        ({"initial_state": randn(1, 2, 16, 8)}, r"the state has shape \(1, 2, 16, 8\); expected .*\(1, 2, 16, 16\)"),
        ({"seq_idx": documents(1, 6)}, r"seq_idx is torch.int32 \(1, 6\); expected integers \(1, 5\)"),
        ({"cu_seqlens": documents(1, 2)[0], "seq_idx": documents(1, 5)}, "cu_seqlens goes with one row"),
        ({"chunk": 48}, "chunk 48 is not a power of two"),
        ({"beta": torch.empty(1, 5, 2, device="meta")}, "beta is on meta, v on"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    for implementation in ("triton", "reference"):
        with pytest.raises(ValueError, match=message):
            public.delta_rule(**{**inputs(5), **change}, implementation=implementation)


def test_what_the_kernel_does_not_take():
    with pytest.raises(ValueError, match=r"it takes K and V from 16 to 256, not K = 8 and V = 16"):
        delta_rule(**inputs(5, K=8))
    with pytest.raises(ValueError, match=r"it does not take torch\.float64"):
        delta_rule(**{n: x.double() for n, x in inputs(5).items()})


def test_compiles_for_hopper():
    K = V = 128
    x = {n: t.requires_grad_() for n, t in inputs(130, K=K, V=V, dtype=torch.bfloat16).items()}
    with recording(dry=True) as launches:
        delta_rule(**x)[0].sum().backward()
        with torch.no_grad():
            delta_rule_step(**{n: t[:, 0] for n, t in x.items()}, state=randn(1, 2, K, V))
    assert len(launches) == 6
    assert_fits_hopper(launches)


class TestOnTheGPU:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("gate", [0, 0.2])
    @pytest.mark.parametrize("options", [{"H": 8}, {"H": 8, "G": 4, "V": 256}, {"H": 4, "K": 64, "V": 64}])
    def test_real_sizes(self, gate, options):
        shape = {"B": 2, "K": 128, "V": 128, "state": True, "gate": gate, "dtype": torch.bfloat16} | options
        assert_same(delta_rule, reference, inputs(1117, **shape))

    def test_every_configuration(self):
        """Every kernel in every configuration it may be tuned to, against the reference."""
        from archsearch_kernels.launch import forcing

        tensors = inputs(1000, B=2, H=4, K=128, V=128, state=True, dtype=torch.bfloat16)
        expected = outputs_and_gradients(reference, {n: x.double() for n, x in tensors.items()})
        with recording() as launches:
            outputs_and_gradients(delta_rule, tensors)
        for launch in {x.kernel.name: x for x in launches}.values():
            for config in launch.kernel.configs(launch.arguments):
                with forcing(launch.kernel.name, config):
                    found, again = (outputs_and_gradients(delta_rule, tensors) for _ in range(2))
                wrong = {n: e for n in found if (e := error(found[n], expected[n])) > 1.5e-2}
                assert not wrong, f"{launch.kernel.name} {config}: {wrong}"
                changed = [n for n in found if not torch.equal(found[n], again[n])]
                assert not changed, f"{launch.kernel.name} {config}: {changed} differ at a second run"

    def test_twenty_runs_are_equal(self):
        tensors = inputs(4099, B=2, H=8, K=128, V=128, dtype=torch.bfloat16)
        first = outputs_and_gradients(delta_rule, tensors)
        for _ in range(19):
            for name, x in outputs_and_gradients(delta_rule, tensors).items():
                assert torch.equal(x, first[name]), name

    def test_in_a_graph(self):
        tensors = inputs(512, H=4, K=64, V=64, dtype=torch.bfloat16)
        expected = delta_rule(**tensors)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = delta_rule(**tensors)[0]
        graph.replay()
        assert torch.equal(o, expected)
