"""One token from its projections in one launch: keys made unit, steps, decays and the skip made on the way."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, ON_GPU, assert_fits_hopper, error, randn

from archsearch_kernels import delta_rule, kda, scalar_decay
from archsearch_kernels.lasting import kept
from archsearch_kernels.launch import forcing, recording

pytest.importorskip("triton")


def delta(B=2, H=4, G=2, K=24, V=40, decay=True, dtype=torch.float32):
    per_head = {"A_log": randn(H, seed=5), "dt_bias": randn(H, seed=6)} if decay else {"A_log": None, "dt_bias": None}
    return {
        "q": 3 * randn(B, G, K, seed=1).to(dtype),
        "k": 0.2 * randn(B, G, K, seed=2).to(dtype),
        "v": randn(B, H, V, seed=3).to(dtype),
        "beta": randn(B, H, seed=4).to(dtype),
        "decay": 9 * randn(B, H, seed=7).to(dtype) if decay else None,
        **per_head,
        "state": randn(B, H, K, V, seed=8),
    }


def kimi(B=2, H=4, K=24, V=40, dtype=torch.float32):
    x = delta(B, H, H, K, V, dtype=dtype)
    return x | {"decay": 9 * randn(B, H, K, seed=7).to(dtype), "dt_bias": randn(H * K, seed=6)}


def ssd(B=2, H=4, G=2, K=24, V=40, dtype=torch.float32):
    x = delta(B, H, G, K, V, dtype=dtype)
    return {
        "C": x["q"],
        "B": x["k"],
        "u": x["v"],
        "dt": x["decay"],
        "A_log": x["A_log"],
        "dt_bias": x["dt_bias"],
        "D": randn(H, seed=9),
        "state": x["state"],
    }


OPERATIONS = {
    "delta rule": (delta_rule.projected_delta_rule_step, lambda **o: delta(decay=False, **o) | {"max_beta": 2.0}),
    "gated delta rule": (delta_rule.projected_delta_rule_step, delta),
    "kda": (kda.projected_kda_step, kimi),
    "ssd": (scalar_decay.ssd_step, ssd),
}
each = pytest.mark.parametrize(("step", "inputs"), OPERATIONS.values(), ids=OPERATIONS)


def run(step, x, implementation, inplace=True):
    """Output and state; the inputs stay."""
    return step(**x | {"state": x["state"].clone()}, inplace=inplace, implementation=implementation)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_reference(step, inputs, dtype):
    x = inputs(dtype=dtype)
    precise = run(step, {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in x.items()}, "reference")
    found = run(step, x, "triton")
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    assert error(found[1], precise[1]) < 1e-5, "products are made in float32"
    assert error(found[0], precise[0]) < {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 7e-4}[dtype]
    for one, other in zip(found, run(step, x, "triton", inplace=False), strict=True):
        assert torch.equal(one, other)


@each
def test_in_place_and_on_views(step, inputs):
    """As a mixer calls it: operands are slices of one projection, the state is written over."""
    x = inputs()
    x |= {n: torch.stack((t, t), dim=-1)[..., 0] for n, t in x.items() if n in ("decay", "dt") and t is not None}
    x |= {n: torch.stack((x[n], x[n] + 7), dim=-1)[..., 0] for n in ("A_log", "dt_bias", "D") if x.get(n) is not None}
    for name in ("q", "k", "v", "C", "B", "u"):
        if name in x:
            flat = torch.cat((randn(2, 3), x[name].flatten(1)), dim=1)
            x[name] = flat[:, 3:].unflatten(1, x[name].shape[1:])
    state = x["state"].clone()
    o, new = step(**x | {"state": state}, inplace=True, implementation="triton")
    assert new is state
    expected = run(step, x, "reference")
    assert error(o, expected[0]) < 1e-5
    assert error(state, expected[1]) < 1e-5


def test_the_gated_delta_rule_is_its_parts():
    x = delta()
    steps = 1.5 * x["beta"].sigmoid()
    g = -x["A_log"].exp() * F.softplus(x["decay"] + x["dt_bias"])
    q, k = (F.normalize(x[n], dim=-1) for n in "qk")
    expected = delta_rule.delta_rule_step(q, k, x["v"], steps, g, x["state"], implementation="reference")
    for implementation in ("triton", "reference"):
        found = run(delta_rule.projected_delta_rule_step, x | {"max_beta": 1.5}, implementation)
        assert error(found[0], expected[0]) < 1e-4  # |q|^2 + 1e-6 is made 1, not |q|^2
        assert error(found[1], expected[1]) < 1e-4


@each
def test_extreme_projections(step, inputs):
    """Decays of 0 and -inf, steps of 0 and their most."""
    for extreme in (-80.0, -30.0, 30.0, 80.0):
        x = inputs()
        x |= {n: torch.full_like(x[n], extreme) for n in ("beta", "decay", "dt") if x.get(n) is not None}
        found, expected = run(step, x, "triton"), run(step, x, "reference")
        for one, other in zip(found, expected, strict=True):
            assert torch.isfinite(one).all()
            assert error(one, other) < 1e-5, extreme


@each
def test_a_gradient_is_not_promised(step, inputs):
    x = inputs()
    name = "v" if "v" in x else "u"
    x[name].requires_grad_()
    with pytest.raises(ValueError, match="has no gradient"):
        step(**x, implementation="triton")
    run(step, x, "reference", inplace=False)[0].sum().backward()
    assert x[name].grad is not None


@pytest.mark.parametrize(
    ("step", "x", "message"),
    [
        (delta_rule.projected_delta_rule_step, delta() | {"A_log": None}, "A_log is missing and decay is not"),
        (delta_rule.projected_delta_rule_step, delta() | {"decay": None}, "A_log is given and decay is not"),
        (delta_rule.projected_delta_rule_step, delta() | {"dt_bias": randn(3)}, r"dt_bias is \(3,\) on"),
        (kda.projected_kda_step, kimi() | {"dt_bias": randn(4)}, r"dt_bias is \(4,\); expected \[H K\] = \(96,\)"),
        (scalar_decay.ssd_step, ssd() | {"D": randn(4, 40)}, r"D is \(4, 40\) on"),
        (scalar_decay.ssd_step, ssd() | {"u": randn(2, 4)}, r"u has shape \(2, 4\); expected"),
        (scalar_decay.ssd_step, ssd() | {"B": randn(2, 1, 24)}, r"B has shape \(2, 1, 24\), C \(2, 2, 24\)"),
        (delta_rule.projected_delta_rule_step, delta() | {"decay": randn(2, 3)}, r"decay has shape \(2, 3\)"),
        (scalar_decay.ssd_step, ssd() | {"dt": randn(4)}, r"dt has shape \(4,\); expected \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_said(step, x, message):
    for implementation in ("triton", "reference"):
        with pytest.raises(ValueError, match=message):
            step(**x, implementation=implementation)


@each
def test_fits_hopper(step, inputs):
    with recording() as launches:
        run(step, inputs(K=128, V=128, dtype=torch.bfloat16), "triton")
    (launch,) = launches
    assert_fits_hopper([launch])


@each
def test_torch_compile_and_autograd_know_that_the_state_is_written(step, inputs):
    traced = torch.compile(partial(step, implementation="triton"), backend="eager", fullgraph=True)
    x = inputs()
    with torch.no_grad():
        expected = step(**x, implementation="triton")
        assert all(torch.equal(*pair) for pair in zip(traced(**x), expected, strict=True))
        for run_in_place in (traced, partial(step, implementation="triton")):
            state = x["state"].clone()
            version = state._version
            o, _ = run_in_place(**x | {"state": state}, inplace=True)
            assert torch.equal(o, expected[0])
            assert torch.equal(state, expected[1])
            assert state._version > version


def test_kept_tensors_are_made_once():
    made = []

    def make():
        made.append(1)
        return torch.ones(3, device=DEVICE)

    device = torch.device(DEVICE)
    assert kept(device, "test", make) is kept(device, "test", make)
    assert kept(device, "another", make) is not kept(device, "test", make)
    assert len(made) == 2
    with torch.inference_mode():
        kept(device, "of training too", make)
    assert not kept(device, "of training too", make).is_inference()


class TestOnTheGPU:
    pytestmark = ON_GPU

    @each
    def test_every_configuration(self, step, inputs):
        x = inputs(B=8, H=16, K=128, V=128, dtype=torch.bfloat16)
        precise = run(step, {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in x.items()}, "reference")
        with recording() as launches:
            run(step, x, "triton")
        (launch,) = launches
        for config in launch.kernel.configs(launch.arguments):
            with forcing(launch.kernel.name, config):
                found, again = (run(step, x, "triton") for _ in range(2))
            assert error(found[0], precise[0]) < 5e-3, config
            assert error(found[1], precise[1]) < 1e-4, config
            assert all(torch.equal(*pair) for pair in zip(found, again, strict=True)), config

    @each
    def test_in_a_graph(self, step, inputs):
        x = inputs(H=16, K=128, V=128, dtype=torch.bfloat16)
        expected = run(step, x, "triton")
        state = x["state"].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = step(**x | {"state": state}, inplace=True, implementation="triton")
        state.copy_(x["state"])
        graph.replay()
        assert torch.equal(o, expected[0])
        assert torch.equal(state, expected[1])

    def test_a_capture_uses_kept_tensors_and_keeps_none_of_its_own(self):
        device, made = torch.device("cuda", 0), []

        def make():
            made.append(1)
            return torch.ones(3, device=device)

        before = kept(device, "before the capture", make)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert kept(device, "before the capture", make) is before
            inside = kept(device, "in the capture", make)
        assert kept(device, "in the capture", make) is not inside
        assert len(made) == 3
