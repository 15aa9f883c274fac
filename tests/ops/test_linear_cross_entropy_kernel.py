"""The linear cross-entropy's kernels against the logits in full: losses, gradients, what does not count, memory."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_fits_hopper, assert_same, error, outputs_and_gradients, randn

from archsearch_kernels.launch import recording
from archsearch_kernels.linear_cross_entropy import chunk, linear_cross_entropy, reference


def case(N, V, C, dtype=torch.float32, weight=None, ignored=True):
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(N + V))
    if ignored and N > 1:
        targets[::5] = -100
    return {
        "x": randn(N, C, seed=1, dtype=dtype),
        "weight": randn(V, C, seed=2, dtype=weight or dtype, scale=0.3),
        "targets": targets.to(DEVICE),
    }


def ours(**inputs):
    return linear_cross_entropy(**inputs, implementation="triton")


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of rows where otherwise one would do."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("N", "V"), [(1, 7), (100, 1000), (300, 129)])
def test_losses_and_gradients(N, V, reduction, small_chunks):
    inputs = case(N, V, 24)
    assert chunk.chunk_rows(300, 24, 129, 4, 4) == 128
    assert_same(ours, reference.linear_cross_entropy, {**inputs, "reduction": reduction})


@pytest.mark.parametrize("options", [{"z_loss": 0.02}, {"logit_scale": 0.3}, {"logit_scale": -1.5, "z_loss": 0.1}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scale_and_z_loss(options, reduction):
    inputs = {**case(33, 70, 16), **options, "reduction": reduction, "ignore_index": 3}
    inputs["targets"][inputs["targets"] < 0] = 3
    assert_same(ours, reference.linear_cross_entropy, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("master", [False, True])
def test_sixteen_bits(dtype, master, small_chunks):
    inputs = case(200, 500, 32, dtype, torch.float32 if master else None)
    assert_same(ours, reference.linear_cross_entropy, inputs)
    if master:
        assert_same(ours, reference.linear_cross_entropy, {**inputs, "reduction": "none"})


def test_a_large_vocabulary_is_read_in_tiles():
    assert_same(ours, reference.linear_cross_entropy, case(3, 20_001, 8))


def test_small_gradients_survive_fp16():
    inputs = case(500, 400, 16, torch.float16, ignored=False)
    got = outputs_and_gradients(ours, inputs)
    wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    expected = outputs_and_gradients(reference.linear_cross_entropy, wide)
    assert error(got["gradient of weight"], expected["gradient of weight"]) < 5e-3


def test_torch_agrees():
    inputs = case(50, 90, 16)

    def torch_op(x, weight, targets):
        return F.cross_entropy(x @ weight.T, targets)

    assert_same(ours, torch_op, inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_retained_graph_gives_the_same_again(reduction):
    inputs = case(40, 60, 16)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    loss = ours(**inputs, reduction=reduction)
    grad = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, (x, weight), grad, retain_graph=True)
    kept = [g.clone() for g in first]
    first[0].zero_()
    again = torch.autograd.grad(loss, (x, weight), grad)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_learns_gets_a_gradient(frozen):
    inputs = case(20, 30, 16)
    learning = "weight" if frozen == "x" else "x"
    inputs[learning].requires_grad_()
    ours(**inputs).backward()
    assert inputs[frozen].grad is None
    expected = {n: v.detach().requires_grad_(n == learning) for n, v in inputs.items()}
    reference.linear_cross_entropy(**expected).backward()
    torch.testing.assert_close(inputs[learning].grad, expected[learning].grad, rtol=1e-4, atol=1e-6)


def test_without_gradients_none_are_made():
    inputs = case(20, 30, 16)
    inputs["x"].requires_grad_()
    with torch.no_grad(), recording() as launches:
        loss = ours(**inputs)
    assert not loss.requires_grad
    assert all(launch.arguments.get("dlogits") is None for launch in launches)


def test_autocast_multiplies_in_its_dtype():
    inputs = case(20, 30, 16)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = ours(**inputs)
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == loss.dtype == torch.float32
    assert error(loss, reference.linear_cross_entropy(**inputs)) < 1.5e-2


def test_rows_that_do_not_count():
    inputs = case(8, 30, 16)
    inputs["targets"][:] = -100
    x = inputs["x"].requires_grad_()
    loss = ours(**inputs)
    loss.backward()
    assert loss.isnan()  # the mean of nothing, as in torch
    assert x.grad.eq(0).all()
    inputs["targets"][0] = 30
    assert ours(**inputs).isnan()


def test_non_contiguous_inputs():
    inputs = case(40, 60, 16)
    inputs["x"] = inputs["x"].T.contiguous().T
    inputs["weight"] = inputs["weight"].T.contiguous().T
    assert_same(ours, reference.linear_cross_entropy, inputs)


def test_runs_are_bit_equal():
    inputs = case(64, 100, 16, torch.bfloat16)
    first, second = (outputs_and_gradients(ours, inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    inputs = case(8, 20, 16)
    arguments = [inputs["x"].requires_grad_(), inputs["weight"].requires_grad_(), inputs["targets"]]
    options = (-100, 1.0, 0.0, reduction, True, True)
    torch.library.opcheck(torch.ops.archsearch.linear_cross_entropy.default, (*arguments, *options))
    grad = randn(8)
    plain = [a.detach() for a in arguments]
    backward = torch.ops.archsearch.linear_cross_entropy_backward.default
    torch.library.opcheck(backward, (*plain, grad, -100, 1.0, 0.0, True, True))
    torch.library.opcheck(torch.ops.archsearch.linear_cross_entropy_scale.default, (plain[0], grad[:1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": randn(2, 3, 4)}, r"x is \(2, 3, 4\); expected \[N, C\]"),
        ({"weight": randn(30, 4)}, r"weight is \(30, 4\); expected \[V, 16\]"),
        ({"targets": randn(8)}, r"targets is torch.float32 \(8,\); expected integers \[8\]"),
        ({"reduction": "max"}, "reduction is 'max'; expected mean, sum or none"),
    ],
)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_bad_input(change, message, implementation):
    inputs = {**case(8, 30, 16), **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**inputs, implementation=implementation)


def test_float64_falls_to_the_reference():
    inputs = case(8, 30, 16, torch.float64)
    assert linear_cross_entropy(**inputs).dtype == torch.float64
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, not torch\.float64"):
        ours(**inputs)


def test_it_fits_hopper():
    with recording(dry=True) as launches:
        for dtype, weight in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
            outputs_and_gradients(ours, case(2, 32768, 16, dtype, weight))
    assert len(launches) == 8
    assert_fits_hopper(launches)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("V", [32768, 50257])
def test_real_sizes(V):
    inputs = case(4097, V, 1024, torch.bfloat16)
    inputs["weight"] *= 0.1
    assert_same(ours, reference.linear_cross_entropy, inputs)
    first = outputs_and_gradients(ours, inputs)
    for _ in range(20):
        again = outputs_and_gradients(ours, inputs)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")  # the leaves were made on another stream
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_it_can_be_captured():
    inputs = case(1000, 5000, 256, torch.bfloat16, torch.float32)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()

    def step():
        x.grad = weight.grad = None
        loss = ours(**inputs)
        loss.backward()
        return loss, x.grad, weight.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [t.clone() for t in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
