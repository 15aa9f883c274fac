"""Kernels of linear attention with scalar decay against the reference, outputs and gradients."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    LENGTHS,
    ON_GPU,
    TOLERANCE,
    assert_fits_hopper,
    assert_same,
    error,
    outputs_and_gradients,
    randn,
)

from archsearch_kernels.launch import recording
from archsearch_kernels.scalar_decay import reference, scalar_decay, scalar_decay_step

pytest.importorskip("triton")


def kernel(**options):
    return scalar_decay(**options, implementation="triton")


def step_kernel(**options):
    return scalar_decay_step(**options, implementation="triton")


def inputs(T, B=1, H=2, G=2, K=16, V=32, fixed=False, state=False, documents=0.0, dtype=torch.float32, decay=1.0):
    """Decays are up to `decay` a token; a document ends with probability `documents`."""
    g = -decay * randn(*((H,) if fixed else (B, T, H)), seed=4).abs()
    given = {
        "q": randn(B, T, G, K, seed=1, dtype=dtype),
        "k": randn(B, T, G, K, seed=2, dtype=dtype),
        "v": randn(B, T, H, V, seed=3, dtype=dtype),
        "g": g,
    }
    if state:
        given["initial_state"] = randn(B, H, K, V, seed=5)
    if documents:
        ends = torch.rand(B, T, generator=torch.Generator().manual_seed(6)) < documents
        given["seq_idx"] = ends.int().cumsum(1).int().to(DEVICE)
    return given


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("fixed", [False, True], ids=["data", "fixed"])
def test_outputs_and_gradients(T, fixed):
    assert_same(kernel, reference.scalar_decay, inputs(T, fixed=fixed, state=True))


@pytest.mark.parametrize(
    "case",
    [
        {"T": 100, "H": 4, "G": 2, "B": 2},
        {"T": 40, "H": 8, "G": 1, "fixed": True, "documents": 0.1},
        {"T": 257, "documents": 0.02, "state": True},
        {"T": 100, "documents": 0.3, "H": 1, "G": 1},
        {"T": 65, "K": 48, "V": 80, "H": 1, "G": 1, "state": True},
        {"T": 40, "K": 256, "V": 16, "H": 2, "G": 1},
        {"T": 20, "K": 192, "V": 96, "H": 1, "G": 1, "dtype": torch.bfloat16},
        {"T": 33, "K": 16, "V": 256, "H": 1, "G": 1},
        {"T": 100, "decay": 0.01},
        {"T": 100, "decay": 20.0, "state": True},
        {"T": 100, "decay": 1e4},
    ],
    ids=str,
)
def test_shapes_documents_and_strong_decays(case):
    assert_same(kernel, reference.scalar_decay, inputs(**case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    assert_same(kernel, reference.scalar_decay, inputs(150, H=2, G=1, state=True, documents=0.01, dtype=dtype))


def test_no_decay_and_infinite_decay():
    given = inputs(100)
    given["g"] = torch.where(randn(1, 100, 2, seed=8) > 1, float("-inf"), 0.0)
    expected, _ = reference.scalar_decay(**given)
    assert error(kernel(**given)[0], expected) < TOLERANCE[torch.float32]
    found = outputs_and_gradients(kernel, given)
    assert all(x.isfinite().all() for x in found.values())


def test_packed_is_separate():
    first, second = inputs(70, state=True), inputs(51)
    both = {n: first[n] if n == "initial_state" else torch.cat([first[n], second[n]], 1) for n in first}
    cu_seqlens = torch.tensor([0, 70, 121], dtype=torch.int32, device=DEVICE)
    packed, state = kernel(**both, cu_seqlens=cu_seqlens)
    alone, last = kernel(**second)
    assert error(packed[:, :70], kernel(**first)[0]) < 1e-5
    assert error(packed[:, 70:], alone) < 1e-5
    assert error(state, last) < 1e-5


def test_slices_are_read_in_place_and_expanded_gradients_work():
    qkv = randn(2, 70, 5 * 32, dtype=torch.float16).requires_grad_()
    g = randn(2, 70, 3).abs().neg()

    def run(form, qkv):
        q, k, v = qkv[..., :32].unflatten(-1, (1, 32)), qkv[..., 32:64].unflatten(-1, (1, 32)), qkv[..., 64:]
        o, _ = form(q=q, k=k, v=v.unflatten(-1, (3, 32)), g=g)
        (gradient,) = torch.autograd.grad(o.sum(), qkv)
        return o, gradient

    for ours, expected in zip(run(kernel, qkv), run(reference.scalar_decay, qkv), strict=True):
        assert error(ours, expected) < 3e-3


def test_only_the_final_state_is_used():
    given = inputs(50)
    found = {}
    for form in (kernel, reference.scalar_decay):
        leaves = {n: x.clone().requires_grad_() for n, x in given.items()}
        form(**leaves)[1].square().sum().backward()
        found[form] = [leaves[n].grad for n in "kvg"]
    for ours, expected in zip(*found.values(), strict=True):
        assert error(ours, expected) < 2e-3


@pytest.mark.parametrize("fixed", [False, True], ids=["data", "fixed"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_a_step(fixed, inplace):
    given = inputs(1, B=3, H=4, G=2, K=48, V=40, fixed=fixed, state=True, dtype=torch.bfloat16)
    state = given.pop("initial_state")
    token = {n: x if x.dim() == 1 else x[:, 0] for n, x in given.items()}
    before = state.clone()
    o, new = step_kernel(**token, state=state, inplace=inplace, scale=0.3)
    expected = reference.scalar_decay_step(**token, state=before, scale=0.3)
    assert error(o, expected[0]) < 5e-3
    assert error(new, expected[1]) < 1e-5
    assert (new.data_ptr() == state.data_ptr()) == inplace
    assert inplace or torch.equal(state, before)


def test_steps_follow_the_chunks():
    given = inputs(40, H=2, G=1)
    o, final = kernel(**given)
    _, state = kernel(**{n: x[:, :37] for n, x in given.items()})
    for t in range(37, 40):
        row, state = step_kernel(**{n: x[:, t] for n, x in given.items()}, state=state, inplace=True)
        assert error(row, o[:, t]) < 2e-3
    assert error(state, final) < 2e-3


def test_where_a_step_needs_a_gradient_the_reference_runs():
    token = {n: x[:, 0].requires_grad_() for n, x in inputs(1).items()}
    o, _ = scalar_decay_step(**token, state=randn(1, 2, 16, 32))
    o.sum().backward()
    assert token["q"].grad is not None


def test_runs_are_equal_bit_for_bit():
    given = inputs(130, H=4, G=1, dtype=torch.bfloat16, state=True)
    first, second = (outputs_and_gradients(kernel, given) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_it_is_fla_s_simple_gla():
    naive = pytest.importorskip("fla.ops.simple_gla.naive")
    given = inputs(96, K=32)
    expected, state = naive.naive_recurrent_simple_gla(
        given["q"], given["k"], given["v"], given["g"], scale=0.2, output_final_state=True
    )
    o, final = kernel(**given, scale=0.2)
    assert error(o, expected) < 2e-3
    assert error(final, state) < 2e-3


def test_operators_satisfy_torch():
    from archsearch_kernels.scalar_decay import chunk, step  # noqa: F401

    given = inputs(20, H=4, G=2, state=True, documents=0.1)
    leaves = [given[n].requires_grad_() for n in ("q", "k", "v", "g", "initial_state")]
    torch.library.opcheck(torch.ops.archsearch.scalar_decay.default, (*leaves, given["seq_idx"], 0.3))
    q, k, v, g, first = (x.detach() for x in leaves)
    arguments = (q, k, v, g, first, None, 0.3, None, v, first, True)
    torch.library.opcheck(torch.ops.archsearch.scalar_decay_backward.default, arguments)
    for made in ((None, None, None), (randn(4), randn(4), randn(4))):
        token = (q[:, 0], k[:, 0], v[:, 0], g[:, 0], *made, first, 0.3)
        torch.library.opcheck(torch.ops.archsearch.scalar_decay_step.default, token)
        torch.library.opcheck(torch.ops.archsearch.scalar_decay_step_.default, token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": (2, 5, 16)}, r"v has shape \(2, 5, 16\); expected \[B, T, H, V\]"),
        ({"q": (2, 5, 3, 16)}, r"q has shape \(2, 5, 3, 16\), v \(2, 5, 4, 16\)"),
        ({"k": (2, 5, 4, 32)}, r"k has shape \(2, 5, 4, 32\), q \(2, 5, 2, 16\)"),
        ({"g": (2, 5)}, r"g has shape \(2, 5\); expected \(2, 5, 4\) or \(4,\)"),
        ({"initial_state": (2, 4, 16)}, r"initial_state has shape \(2, 4, 16\)"),
        ({"seq_idx": (2, 5)}, r"seq_idx is torch.float32 \(2, 5\); expected integers"),
        ({"cu_seqlens": (2,)}, r"cu_seqlens goes with one row"),
    ],
)
def test_bad_input_is_named(change, message):
    shapes = {"q": (2, 5, 2, 16), "k": (2, 5, 2, 16), "v": (2, 5, 4, 16), "g": (2, 5, 4), **change}
    with pytest.raises(ValueError, match=message):
        scalar_decay(**{n: randn(*shape) for n, shape in shapes.items()})


def test_what_the_kernel_does_not_take():
    with pytest.raises(ValueError, match="K = 8 and V = 16 are not both from 16 to 256"):
        kernel(**inputs(5, K=8, V=16))
    with pytest.raises(ValueError, match=r"q and v are torch\.float64"):
        kernel(**inputs(5, dtype=torch.float64))


@pytest.mark.parametrize(
    "case",
    [{"fixed": True}, {}, {"V": 64, "H": 8, "G": 1}],
    ids=str,
)
def test_launches_fit_hopper(case):
    given = inputs(64, **{"H": 1, "G": 1, "K": 128, "V": 128, "dtype": torch.bfloat16, **case})
    with recording(dry=True) as launches:
        leaves = {
            n: x.requires_grad_(x.dtype == torch.bfloat16 or (x.dim() > 1 and n != "seq_idx")) for n, x in given.items()
        }
        o, _ = kernel(**leaves)
        o.backward(torch.ones_like(o))
        with torch.no_grad():
            token = {n: given[n] if given[n].dim() == 1 else given[n][:, 0] for n in "qkvg"}
            step_kernel(**token, state=randn(1, given["v"].shape[2], *given["q"].shape[3:], given["v"].shape[3]))
    # Of heads that share keys, the gradients of keys and decays spill to the cache, between heads.
    assert_fits_hopper(launches, spills=600 if case.get("H", 1) > case.get("G", 1) else 0)


@pytest.mark.parametrize(
    "case", [{"fixed": True}, {"documents": 0.001, "state": True}, {"H": 32, "G": 2, "V": 64}], ids=str
)
class TestOnGPU:
    pytestmark = ON_GPU

    def test_real_sizes(self, case):
        case = {"decay": 0.1, "H": 8, "G": 8, "K": 128, "V": 128, **case}
        assert_same(kernel, reference.scalar_decay, inputs(4133, B=2, dtype=torch.bfloat16, **case))

    def test_repeats_are_equal(self, case):
        case = {"decay": 0.1, "H": 8, "G": 8, "K": 128, "V": 128, **case}
        given = inputs(4133, B=2, dtype=torch.bfloat16, **case)
        first = outputs_and_gradients(kernel, given)
        for _ in range(20):
            again = outputs_and_gradients(kernel, given)
            assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("width", [64, 128, 256])
class TestEveryConfigurationOnGPU:
    """Timing alone has picked wrong configurations elsewhere: each one that ships is right."""

    pytestmark = ON_GPU

    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize("fixed", [False, True], ids=["data", "fixed"])
    def test_gradients(self, width, groups, fixed):
        from archsearch_kernels.launch import forcing

        given = inputs(
            700, B=2, H=4, G=groups, K=width, V=min(width, 128), fixed=fixed, dtype=torch.bfloat16, decay=0.1
        )
        with recording() as launches:
            outputs_and_gradients(kernel, given)
        for launch in {x.key: x for x in launches}.values():
            for config in launch.kernel.configs(launch.arguments):
                with forcing(launch.kernel.name, config):
                    assert_same(kernel, reference.scalar_decay, given)
