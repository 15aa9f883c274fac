"""The mixture's kernels against one choice at a time and torch's grouped product: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_fits_hopper, assert_same, outputs_and_gradients, randn

from archsearch_kernels.launch import recording
from archsearch_kernels.moe import grouped_mm, moe, parallel, reference, route, router

BOTH = ["triton", "torch"]


def choose(N, E, k, seed=0):
    """Distinct experts for each token; the last expert gets none where there is choice enough."""
    score = torch.rand(N, max(k, E - 1), generator=torch.Generator().manual_seed(seed))
    return score[:, :E].topk(k, dim=-1).indices.to(DEVICE)


def case(N, E, k, D, width, dtype=torch.float32):
    return {
        "x": randn(N, D, seed=1, dtype=dtype),
        "weights": randn(N, k, seed=2).abs(),
        "chosen": choose(N, E, k),
        "gate_proj": randn(E, width, D, seed=3, dtype=dtype, scale=D**-0.5),
        "up_proj": randn(E, width, D, seed=4, dtype=dtype, scale=D**-0.5),
        "down_proj": randn(E, D, width, seed=5, dtype=dtype, scale=width**-0.5),
    }


def ours(products="triton"):
    return lambda **inputs: moe(**inputs, implementation="triton", products=products)


SHAPES = [(1, 4, 2, 16, 16), (63, 5, 3, 24, 40), (100, 3, 1, 48, 8), (40, 20, 4, 72, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape):
    assert_same(ours(), reference.moe, case(*shape))


def test_one_choice_at_a_time():
    assert_same(ours(), reference.moe_loop, case(9, 4, 2, 16, 24))


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's product takes bf16 alone there without waiting")
@pytest.mark.parametrize("shape", [(1, 4, 2, 16, 16), (63, 5, 3, 24, 40)], ids=str)
def test_products_by_torch(shape):
    assert_same(ours("torch"), reference.moe, case(*shape))


@pytest.mark.parametrize("bits", range(5))
def test_every_product_by_either(bits, monkeypatch):
    monkeypatch.setattr(parallel, "plan", lambda *_: 1 << bits)
    assert_same(ours(None), reference.moe, case(30, 4, 2, 32, 48, torch.bfloat16))


@pytest.mark.parametrize("products", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype, products):
    if products == "torch" and dtype == torch.float16:
        pytest.skip("torch's product is for bf16")
    assert_same(ours(products), reference.moe, case(70, 6, 2, 64, 32, dtype))


def test_large_tiles():
    """Many rows an expert take other tiles than few."""
    assert_same(ours(), reference.moe, case(300, 2, 2, 80, 72, torch.bfloat16))


def test_every_token_to_the_same_experts():
    inputs = case(50, 6, 2, 16, 24)
    inputs["chosen"][:] = torch.tensor([4, 1], device=DEVICE)
    assert_same(ours(), reference.moe, inputs)
    assert_same(ours(), reference.moe, {**inputs, "chosen": inputs["chosen"].int()})


@pytest.mark.parametrize(("N", "k", "E"), [(3, 2, 7), (256, 2, 60), (600, 3, 5), (700, 2, 200)])
def test_the_sort_is_stable(N, k, E):
    chosen = choose(N, E, k, seed=N)
    order, place, offsets = parallel.sort(chosen, E)
    expected = chosen.flatten().argsort(stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(place.flatten().long()[expected], torch.arange(N * k, device=DEVICE))
    counts = torch.bincount(chosen.flatten(), minlength=E)
    assert torch.equal(offsets.long(), F.pad(counts.cumsum(0), (1, 0)))


@pytest.mark.parametrize("rows", [[5, 0, 64, 31], [0, 0, 1, 0], [200, 3, 0, 0]])
def test_grouped_product(rows):
    inputs = {"x": randn(sum(rows), 24, seed=1), "weight": randn(4, 40, 24, seed=2)}
    inputs["counts"] = torch.tensor(rows, device=DEVICE)

    def run(**inputs):
        return grouped_mm(**inputs, implementation="triton")

    assert_same(run, reference.grouped_mm, inputs)
    wide = {n: v.bfloat16() if v.is_floating_point() else v for n, v in inputs.items()}
    assert_same(run, reference.grouped_mm, wide)
    assert_same(lambda **i: grouped_mm(**i, implementation="triton", products="torch"), reference.grouped_mm, wide)


@pytest.mark.parametrize("routing", ["softmax", "sigmoid", "sigmoid with bias"])
@pytest.mark.parametrize(("N", "E", "k"), [(1, 4, 1), (33, 5, 3), (70, 64, 8), (5, 130, 2)])
def test_routing(routing, N, E, k):
    options = {"top_k": k, "routing": routing.split()[0], "scale": 2.5}
    logits = randn(N, E, seed=E)
    bias = randn(E, seed=3) if routing.endswith("bias") else None
    weights, chosen, counts = route(logits, **options, bias=bias, implementation="triton")
    expected = reference.route(logits, **options, bias=bias)
    assert torch.equal(chosen, expected[1])
    assert torch.equal(counts, expected[2])
    assert weights.dtype == torch.float32
    assert_same(
        lambda logits: route(logits, **options, bias=bias, implementation="triton")[0],
        lambda logits: reference.route(logits, **options, bias=None if bias is None else bias.double())[0],
        {"logits": logits},
    )


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weights", [{"normalize": False}, {"norm_eps": 0.5}], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_weights_of_another_sum(routing, weights, k):
    """The kernel chooses; what it does not divide by is divided by behind it."""
    options = {"top_k": k, "routing": routing, "scale": 2.5, **weights}
    logits = randn(33, 5, seed=4)
    assert torch.equal(route(logits, **options, implementation="triton")[1], reference.route(logits, **options)[1])
    assert_same(
        lambda logits: route(logits, **options, implementation="triton")[0],
        lambda logits: reference.route(logits, **options)[0],
        {"logits": logits},
    )


def test_equal_logits_choose_different_experts():
    for logits in (torch.zeros(3, 6, device=DEVICE), torch.full((3, 6), float("-inf"), device=DEVICE)):
        chosen = route(logits.nan_to_num(neginf=float("-inf")), 4, "sigmoid", implementation="triton")[1]
        assert torch.equal(chosen, torch.arange(4, device=DEVICE).expand(3, 4))


def test_the_module_of_transformers_agrees():
    """Mixtral's block: softmax over all, the best k, divided by their sum."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    block = MixtralSparseMoeBlock(config).to(DEVICE)
    weights = dict(block.named_parameters())
    gate = next(v for n, v in weights.items() if n.startswith("gate"))
    joined = next(v for n, v in weights.items() if "gate_up" in n)
    down = next(v for n, v in weights.items() if "down" in n)
    with torch.no_grad():
        for i, p in enumerate((gate, joined, down)):
            p.copy_(randn(*p.shape, seed=i, scale=0.3))
    x = randn(20, 16)
    w, chosen, _ = route(x @ gate.T, 2, implementation="triton")
    gate_proj, up_proj = joined.chunk(2, dim=1)
    y = moe(x, w, chosen, gate_proj, up_proj, down, implementation="triton")
    expected = block(x[None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(y, expected.view_as(y), rtol=1e-3, atol=1e-4)


def test_non_contiguous_inputs():
    inputs = case(20, 4, 2, 16, 24)
    for name in ("x", "weights", "chosen"):
        inputs[name] = inputs[name].T.contiguous().T
    inputs["down_proj"] = inputs["down_proj"].mT.contiguous().mT
    assert_same(ours(), reference.moe, inputs)


def test_autocast():
    inputs = case(20, 4, 2, 16, 24)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = outputs_and_gradients(ours(), inputs)
    assert got["output 0"].dtype == torch.bfloat16
    assert got["gradient of gate_proj"].dtype == torch.float32


@pytest.mark.parametrize("learns", ["x", "weights", "down_proj"])
def test_only_what_learns_gets_a_gradient(learns):
    inputs, expected = case(20, 4, 2, 16, 24), case(20, 4, 2, 16, 24)
    for given, run in ((inputs, ours()), (expected, reference.moe)):
        given[learns].requires_grad_()
        run(**given).square().sum().backward()
    torch.testing.assert_close(inputs[learns].grad, expected[learns].grad, rtol=2e-3, atol=1e-3)
    assert all(v.grad is None for n, v in inputs.items() if n != learns)


def test_without_gradients_nothing_is_kept():
    with torch.no_grad(), recording() as launches:
        ours()(**case(4, 4, 2, 16, 24))
    assert [x.kernel.name for x in launches] == ["moe_sort", "moe_swiglu_product", "moe_product", "moe_combine"]
    assert launches[1].arguments["gate"] is None


def test_runs_are_bit_equal():
    inputs = case(64, 4, 2, 32, 24, torch.bfloat16)
    first, second = (outputs_and_gradients(ours(), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_opcheck():
    ops, inputs = torch.ops.archsearch, case(6, 4, 2, 16, 24)
    given = [v.requires_grad_() if v.is_floating_point() else v for v in inputs.values()]
    torch.library.opcheck(ops.moe.default, (*given, True, 0))
    x, weights, chosen, *matrices = (v.detach() for v in given)
    kept = ops.moe(x, weights, chosen, *matrices, True, 0)[1:]
    torch.library.opcheck(ops.moe_backward.default, (x, x, weights, *matrices, *kept, True, True, 0))
    offsets = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(ops.grouped_mm.default, (given[0], given[3], offsets, False))
    logits = randn(6, 5).requires_grad_()
    torch.library.opcheck(router.route_op._opoverload, (logits, None, 2, "softmax", 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": randn(2, 3, 4)}, r"x is \(2, 3, 4\); expected \[N, D\]"),
        ({"chosen": randn(6, 2)}, r"chosen is torch.float32 \(6, 2\); expected integers \[6, k\]"),
        ({"weights": randn(6, 3)}, r"weights is \(6, 3\); expected chosen's \(6, 2\)"),
        ({"gate_proj": randn(4, 24, 8)}, r"gate_proj is \(4, 24, 8\); expected \[E, F, 16\]"),
        ({"up_proj": randn(4, 25, 16)}, r"up_proj is \(4, 25, 16\); expected \[4, 24, 16\]"),
        ({"down_proj": randn(4, 24, 16)}, r"down_proj is \(4, 24, 16\); expected \[4, 16, 24\]"),
        ({"x": randn(6, 16, dtype=torch.bfloat16)}, "gate_proj is torch.float32; expected x's torch.bfloat16"),
    ],
)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_bad_input(change, message, implementation):
    with pytest.raises(ValueError, match=message):
        moe(**{**case(6, 4, 2, 16, 24), **change}, implementation=implementation)


def test_bad_routing():
    with pytest.raises(ValueError, match="top_k is 5; expected 1 to 4"):
        route(randn(3, 4), 5)
    with pytest.raises(ValueError, match="routing is 'hash'; expected softmax or sigmoid"):
        route(randn(3, 4), 2, "hash")
    with pytest.raises(ValueError, match=r"counts is torch.int64 \(2,\); expected integers \[3\]"):
        grouped_mm(randn(4, 8), randn(3, 8, 8), torch.ones(2, dtype=torch.long, device=DEVICE))


def test_float64_and_no_tokens_fall_to_the_reference():
    inputs = case(6, 4, 2, 16, 24, torch.float64)
    assert moe(**inputs).dtype == torch.float64
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, not torch\.float64"):
        ours()(**inputs)
    none = case(6, 4, 2, 16, 24)
    none.update({name: none[name][:0] for name in ("x", "weights", "chosen")})
    assert moe(**none).shape == (0, 16)


def test_it_fits_hopper():
    """Few tokens, but features as wide as they come."""
    with recording(dry=True) as launches:
        inputs = case(2, 2, 1, 2048, 1024, torch.bfloat16)
        for products in BOTH:
            outputs_and_gradients(ours(products), inputs)
        parallel.sort(choose(300, 60, 2), 60)
        outputs_and_gradients(lambda logits: route(logits, 8, implementation="triton")[0], {"logits": randn(2, 64)})
    assert len({x.kernel.name for x in launches}) == 13
    assert_fits_hopper(launches)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("products", BOTH)
@pytest.mark.parametrize("shape", [(4099, 64, 8, 1024, 512), (517, 128, 4, 512, 256), (64, 64, 8, 2048, 1024)], ids=str)
def test_real_sizes(shape, products):
    inputs = case(*shape, torch.bfloat16)
    assert_same(ours(products), reference.moe, inputs)
    first = outputs_and_gradients(ours(products), inputs)
    for _ in range(20):
        again = outputs_and_gradients(ours(products), inputs)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")  # the leaves were made on another stream
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("N", [5, 2000])
def test_it_can_be_captured(N):
    inputs = case(N, 16, 2, 256, 128, torch.bfloat16)
    logits = randn(N, 16).requires_grad_()
    inputs["gate_proj"].requires_grad_()

    def step():
        logits.grad = inputs["gate_proj"].grad = None
        weights, chosen, _ = route(logits, 2)
        y = moe(**{**inputs, "weights": weights, "chosen": chosen})
        y.sum().backward()
        return y, logits.grad, inputs["gate_proj"].grad

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
