"""Attention kernels against the one-query-at-a-time truth: outputs and gradients, decode, documents, compiled size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, TOLERANCE, assert_fits_hopper, assert_same, error, poisoned, randn
from torch import Tensor

from archsearch_kernels.attention import arrivals, attention, attention_recurrent, choice, reference, step
from archsearch_kernels.launch import KERNELS, forcing, recording

SPILLS = 48  # bytes, by ptxas 13.1 and 12.9: gradients of keys and values hold two accumulators of 64 registers


def inputs(
    T: int, S: int | None = None, B: int = 1, H: int = 2, G: int = 2, D: int = 32, V: int | None = None, **options: Any
) -> dict[str, Any]:
    S, dtype = S or T, options.pop("dtype", torch.float32)
    given: dict[str, Any] = {
        "q": randn(B, T, H, D, seed=1, dtype=dtype),
        "k": randn(B, S, G, D, seed=2, dtype=dtype),
        "v": randn(B, S, G, V or D, seed=3, dtype=dtype),
    }
    if options.pop("sink", False):
        given["sink"] = randn(H, seed=4)
    if documents := options.pop("documents", None):
        given["seq_idx"] = documents_of(T, B, documents)
    return given | options


def documents_of(T: int, B: int, number: int) -> Tensor:
    """About `number` packed documents a row, in other places in every row."""
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < (number - 1) / T
    return starts.cumsum(1).to(DEVICE, torch.int32)


def kernel(**given: Any) -> Any:
    return attention(**given, implementation="triton")


def truth(**given: Any) -> Any:
    return attention_recurrent(**given)


def form(**given: Any) -> Any:
    return reference.attention(**given)


CASES: dict[str, dict[str, Any]] = {
    "two tokens": {"T": 2, "B": 2},
    "63": {"T": 63, "B": 2},
    "257, grouped": {"T": 257, "G": 1},
    "100, one key head, narrow values": {"T": 100, "G": 1, "D": 64, "V": 16},
    "window": {"T": 257, "window": 70, "D": 16},
    "window of two": {"T": 100, "window": 2},
    "window beyond": {"T": 63, "window": 99},
    "sink": {"T": 100, "sink": True, "H": 4, "G": 2},
    "documents": {"T": 130, "B": 2, "documents": 4, "G": 1},
    "documents, window, sink, sum": {"T": 257, "documents": 3, "window": 40, "sink": True, "return_lse": True},
    "sum": {"T": 100, "return_lse": True},
    "scale": {"T": 63, "scale": 0.5},
    "last of more keys": {"T": 63, "S": 257, "G": 1},
    "last of more keys, window, sink": {"T": 63, "S": 257, "window": 90, "sink": True},
    "wide keys": {"T": 63, "D": 192, "V": 128, "H": 1, "G": 1, "dtype": torch.bfloat16},
    "odd widths": {"T": 63, "D": 48, "V": 80},
}


@pytest.mark.parametrize("case", CASES)
def test_is_the_truth(case: str) -> None:
    assert_same(kernel, truth, inputs(**CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    assert_same(kernel, truth, inputs(100, H=4, G=2, window=60, sink=True, dtype=dtype))


def test_one_token_has_a_gradient() -> None:
    assert_same(kernel, truth, inputs(1, S=70, H=4, sink=True, G=2))


@pytest.mark.parametrize("case", [{}, {"sink": True}, {"window": 50}, {"V": 16, "G": 1}])
@pytest.mark.parametrize("S", [1, 63, 300])
def test_one_query_over_a_cache(S: int, case: dict[str, Any]) -> None:
    """The cache is longer than what is valid and lies as it will."""
    given = inputs(1, S=S, B=2, H=4, **{"G": 2, **case})
    cached = dict(given)
    for name in ("k", "v"):
        x = given[name]
        room = torch.full((2, x.shape[2], S + 9, x.shape[3]), torch.nan, device=DEVICE).transpose(1, 2)
        room[:, :S] = x
        cached[name] = room[:, :S]
    with poisoned():
        o, lse = kernel(**cached, return_lse=True)
    expected, sums = truth(**{n: x.double() if isinstance(x, Tensor) else x for n, x in given.items()}, return_lse=True)
    assert error(o, expected) < TOLERANCE[torch.float32]
    assert error(lse, sums) < TOLERANCE[torch.float32]


def decode(S: int = 600, **options: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Inputs of a step over more than one split, and what it has to give."""
    given = inputs(1, S=S, B=2, **{"H": 4, "G": 2, "D": 16, "sink": True, "return_lse": True, **options})
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in given.items()}
    return given, list(truth(**wide))


@pytest.mark.parametrize("at_once", [16384, 4 * 2 * 16], ids=["at once", "three times two splits"])
@pytest.mark.parametrize("case", [{"H": 4}, {"H": 6, "V": 24}, {"H": 18, "G": 1}, {"dtype": torch.bfloat16}], ids=str)
def test_the_last_to_arrive_merges(case: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch, which leaves its counters at zero; groups of two, of three, and of 18, eight at a time."""
    monkeypatch.setattr(step, "MERGED_AT_ONCE", at_once)
    given, expected = decode(**case)
    with recording() as launches, poisoned():
        got = kernel(**given)
    assert [x.kernel.name for x in launches] == ["attention_step"]
    assert launches[0].arguments["splits"] == 5
    assert not launches[0].arguments["arrived"].any()
    for x, y in zip(got, expected, strict=True):
        assert error(x, y) < TOLERANCE[given["q"].dtype]


def test_much_to_merge_is_a_launch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given, expected = decode()
    one = kernel(**given)
    monkeypatch.setattr(step, "MERGED_BY_ONE", 0)
    with recording() as launches, poisoned():
        two = kernel(**given)
    assert [x.kernel.name for x in launches] == ["attention_step", "attention_combine"]
    assert launches[0].arguments["arrived"] is None
    for x, y, z in zip(one, two, expected, strict=True):
        assert max(error(x, z), error(y, z)) < TOLERANCE[torch.float32]


@pytest.mark.skipif(DEVICE == "cuda", reason="programs of a GPU come in an order of their own")
def test_who_comes_last_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    given, _ = decode()
    first = kernel(**given)
    place = interpreter_builder.set_grid_idx
    orders: list[list[int]] = [[4, 3, 2, 1, 0], [2, 4, 0, 1, 3]]
    for order in orders:
        seen: list[int] = []

        def shuffled(x: int, y: int, z: int, order: list[int] = order, seen: list[int] = seen) -> None:
            seen.append(order[x])
            place(order[x], y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
        with poisoned():
            again = kernel(**given)
        assert seen[-1] == order[-1]
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_captured_launches_share_no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    place = (device.type, device.index)
    monkeypatch.setattr(arrivals, "_reserves", {place: torch.zeros(17, dtype=torch.int32, device=device)})
    taken = [arrivals._reserved(n, device) for n in (3, 4, 5, 9)]  # no room for the last: zeros of its graph's own
    for counters, n in zip(taken, (3, 4, 5, 9), strict=True):
        assert counters.numel() == n
        assert not counters.any()
        counters += n
    assert [c.unique().tolist() for c in taken] == [[3], [4], [5], [9]]
    assert all((c.data_ptr() - taken[0].data_ptr()) % 16 == 0 for c in taken[:3])


def test_a_stream_keeps_its_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_of_streams", {})
    device = torch.device(DEVICE)
    one, other, again = (arrivals._of_stream(4, device, stream) for stream in (1, 2, 1))
    assert one.data_ptr() == again.data_ptr() != other.data_ptr()
    assert arrivals._of_stream(arrivals.LEAST + 1, device, 1).numel() > arrivals.LEAST


def test_steps_and_chunks_are_the_whole() -> None:
    given = inputs(150, H=4, G=2, window=70, sink=True)
    whole = kernel(**given)
    q, k, v = (given.pop(n) for n in "qkv")
    chunks = [
        kernel(q=q[:, a:b], k=k[:, :b], v=v[:, :b], **given) for a, b in ((0, 64), (64, 149), (149, 150))
    ]  # the last is a step
    assert error(torch.cat(chunks, 1), whole) < TOLERANCE[torch.float32]


def test_documents_are_separate() -> None:
    given = inputs(200, G=1, window=30)
    ends = (0, 1, 70, 198, 200)
    lengths = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    packed = kernel(**given, cu_seqlens=lengths)
    q, k, v = (given.pop(n) for n in "qkv")
    apart = [kernel(q=q[:, a:b], k=k[:, a:b], v=v[:, a:b], **given) for a, b in pairwise(ends)]
    assert error(packed, torch.cat(apart, 1)) < TOLERANCE[torch.float32]


def test_views_of_one_projection() -> None:
    """Queries, keys and values lie side by side; the gradient comes in another order of dimensions."""
    T, H, D = 100, 2, 16
    fused = randn(2, T, 3 * H * D).requires_grad_()
    q, k, v = fused.view(2, T, 3, H, D).unbind(2)
    kernel(q=q, k=k, v=v).transpose(1, 2).backward(randn(2, H, T, D, seed=5))
    got, fused.grad = fused.grad, None
    q, k, v = (x.double() for x in fused.view(2, T, 3, H, D).unbind(2))
    form(q=q, k=k, v=v).transpose(1, 2).backward(randn(2, H, T, D, seed=5).double())
    assert got is not None
    assert fused.grad is not None
    assert error(got, fused.grad) < TOLERANCE[torch.float32]


def test_a_window_of_one_is_the_token_itself() -> None:
    given = inputs(100)
    assert error(kernel(**given, window=1), given["v"]) < TOLERANCE[torch.float32]


def test_large_logits_overflow_nothing() -> None:
    given = inputs(100)
    given["q"] = given["q"] * 100
    assert_same(kernel, truth, given, tolerance=None if DEVICE == "cpu" else 2e-2)


def test_a_sink_that_is_off() -> None:
    """A logit of minus infinity is no sink at all."""
    given = inputs(63)
    off = torch.full((2,), -torch.inf, device=DEVICE)
    assert error(kernel(**given, sink=off), kernel(**given)) == 0
    one = {n: x[:, -1:] if n == "q" else x for n, x in given.items()}
    assert error(kernel(**one, sink=off), kernel(**one)) == 0


def test_agrees_with_torch() -> None:
    given = inputs(130, H=4, G=2)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    assert_same(kernel, torchs, given)


def test_repeats_to_the_bit() -> None:
    given = inputs(130, G=1, sink=True, documents=3)
    runs = []
    for _ in range(2):
        leaves = {n: x.clone().requires_grad_() for n, x in given.items() if x.is_floating_point()}
        out = kernel(**given | leaves)
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_key_heads_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where key heads are few, query heads are shared out and summed; the result is the same."""
    from archsearch_kernels.attention import parallel

    given = inputs(63, H=4, G=1)
    with recording() as launches:
        assert_same(kernel, form, given)
    assert launches[-1].arguments["PARTS"] == 4
    monkeypatch.setattr(parallel, "processors", lambda device: 1)
    with recording() as launches:
        assert_same(kernel, form, given)
    assert launches[-1].arguments["PARTS"] == 1


@pytest.mark.parametrize("name", ["attention_forward", "attention_dq", "attention_dkdv"])
def test_every_size_of_tile(name: str) -> None:
    """Tiles that are wider than high, higher than wide, longer than the sequence."""
    for rows, keys in ((16, 64), (64, 16), (128, 128)):
        with forcing(name, {"BM": rows, "BN": keys, "num_warps": 4, "num_stages": 1}):
            assert_same(kernel, form, inputs(70, G=1, window=20, documents=2, D=16))
            assert_same(kernel, form, inputs(40, S=75, G=1, D=16))


def test_opcheck() -> None:
    given = inputs(20, H=2, G=1, D=16)
    q, k, v = (given[n].requires_grad_() for n in "qkv")
    sink = randn(2).requires_grad_()
    docs = documents_of(20, 1, 2)
    kernel(q=q, k=k, v=v)  # registers the operations
    for arguments in ((q, k, v, sink, docs, 5, 0.3), (q, k, v, None, None, None, 0.3)):
        torch.library.opcheck(torch.ops.archsearch.attention.default, arguments)
    one = tuple(x.detach() for x in (q[:, -1:], k, v, sink))
    kernel(q=one[0], k=k.detach(), v=v.detach())
    torch.library.opcheck(torch.ops.archsearch.attention_step.default, (*one, 0.3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": (2, 3)}, r"q is torch.float32 \(2, 3\); expected four dimensions"),
        ({"k": (1, 8, 2, 15)}, r"k is \(1, 8, 2, 15\); expected \[1, S, G, 16\]"),
        ({"v": (1, 7, 2, 16)}, r"v is \(1, 7, 2, 16\); expected \[1, 8, 2, V\]"),
        ({"k": (1, 8, 3, 16), "v": (1, 8, 3, 16)}, "q has 4 heads, k has 3; expected a multiple"),
        ({"q": (1, 9, 4, 16)}, "q has 9 positions, k has 8"),
        ({"sink": (3,)}, r"sink is \(3,\) .*expected \[4\]"),
        ({"seq_idx": (1, 8)}, "seq_idx is torch.float32"),
    ],
)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_bad_shapes_are_named(wrong: dict[str, Any], message: str, implementation: str) -> None:
    shapes = {"q": (1, 8, 4, 16), "k": (1, 8, 2, 16), "v": (1, 8, 2, 16)} | wrong
    with pytest.raises(ValueError, match=message):
        attention(**{n: randn(*s) for n, s in shapes.items()}, implementation=implementation)


def test_bad_options_are_named() -> None:
    given = inputs(8)
    with pytest.raises(ValueError, match="window is 0; expected at least 1"):
        kernel(**given, window=0)
    with pytest.raises(ValueError, match="cu_seqlens with B = 2"):
        kernel(**inputs(8, B=2), cu_seqlens=torch.tensor([0, 8], device=DEVICE))
    with pytest.raises(ValueError, match="heads are 288 and 288 wide, above 256"):
        kernel(**inputs(8, D=288, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"q is torch\.float64"):
        kernel(**inputs(8, dtype=torch.float64))
    assert error(attention(**inputs(8, dtype=torch.float64)), truth(**inputs(8, dtype=torch.float64))) < 1e-9


def test_the_choice_of_torchs_kernel() -> None:
    def chosen(*, gpu: str = "NVIDIA H100 80GB HBM3", T: int = 8192, D: int = 128, **options: Any) -> str:
        return choice.choice(
            gpu, T, D, **{"group": 1, "window": None, "dtype": torch.bfloat16, "gradient": True} | options
        )

    assert chosen() == chosen(gradient=False) == chosen(D=64) == chosen(group=4) == "sdpa"
    for other in ({"window": 1024}, {"plain": False}, {"dtype": torch.float32}, {"T": 64}, {"D": 96}):
        assert chosen(**other) == "triton", other
    given = inputs(64, H=4, G=2, dtype=torch.bfloat16)
    assert error(choice.sdpa(given["q"], given["k"], given["v"], 0.3), form(**given, scale=0.3)) < 1e-2


def launches_of(T: int, S: int, D: int, V: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> list[Any]:
    given = inputs(T, S=S, H=4, D=D, V=V, dtype=dtype, **options)
    with recording(dry=True) as launches:
        if T == 1:
            kernel(**given)
        else:
            leaves = {n: given[n].requires_grad_() for n in "qkv"}
            kernel(**given | leaves).sum().backward()
    return launches


def test_fits_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [
        *launches_of(64, 64, 128, 128, G=4),
        *launches_of(64, 64, 64, 64, G=4, window=32, sink=True, documents=2),
        *launches_of(1, 700, 128, 128, G=1, sink=True),
    ]
    monkeypatch.setattr(step, "MERGED_BY_ONE", 0)
    launches += launches_of(1, 700, 128, 128, G=1, sink=True)
    assert {x.kernel.name for x in launches} == {n for n in KERNELS if n.startswith("attention_")}
    assert_fits_hopper(launches, spills=SPILLS)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    "case",
    [
        {"D": 128},
        {"D": 64, "G": 2},
        {"D": 128, "window": 1024, "sink": True, "G": 2},
        {"D": 128, "documents": 9},
        {"D": 192, "V": 128},
        {"D": 256},
        {"D": 96},
        {"D": 128, "S": 6000, "T": 513},
    ],
)
def test_real_sizes(case: dict[str, Any]) -> None:
    given = inputs(**{"T": 4097, "B": 2, "H": 8, "G": 8, "dtype": torch.bfloat16, **case})
    wide = {n: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in given.items()}

    def run(form: Any, given: dict[str, Any]) -> list[Tensor]:
        leaves = {n: x.clone().requires_grad_() for n, x in given.items() if getattr(x, "dtype", None) in choice_types}
        out = form(**given | leaves)
        return [out, *torch.autograd.grad(out, list(leaves.values()), randn(*out.shape, seed=9).to(out.dtype))]

    choice_types = (torch.bfloat16, torch.float32)
    expected = run(form, wide)
    names = ["attention_forward", "attention_dq", "attention_dkdv"]
    with recording() as launches:
        first = run(kernel, given)
    assert max(error(a, b) for a, b in zip(first, expected, strict=True)) < 1.5e-2
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(kernel, given), first, strict=True))
    for launch in launches:  # every configuration that ships
        if launch.kernel.name in names:
            for config in launch.kernel.configs(launch.arguments):
                with forcing(launch.kernel.name, config):
                    got = run(kernel, given)
                worst = max(error(a, b) for a, b in zip(got, expected, strict=True))
                assert worst < 1.5e-2, (launch.kernel.name, config, worst)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("B", [1, 64])
@pytest.mark.parametrize("S", [1, 1000, 8192, 32768])
def test_real_decode(S: int, B: int) -> None:
    given = inputs(1, S=S, B=B, H=16, G=4, D=128, dtype=torch.bfloat16, sink=True)
    expected = form(**{n: x.float() for n, x in given.items()})
    with recording() as launches:
        got = kernel(**given)
    assert [x.kernel.name for x in launches] == ["attention_step"]
    assert error(got, expected) < 1.5e-2
    assert all(torch.equal(kernel(**given), got) for _ in range(20))
    launch = KERNELS["attention_step"]
    for config in launch.configs(launches[0].arguments):
        with forcing("attention_step", config):
            assert error(kernel(**given), expected) < 1.5e-2, config
            first = kernel(**given)
            assert all(torch.equal(kernel(**given), first) for _ in range(100)), config


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_decode_on_two_streams_and_in_graphs() -> None:
    """Steps that run at the same time, launched and replayed, do not count each other's programs."""
    many = [inputs(1, S=3000 + 500 * i, H=16, G=4, D=128, dtype=torch.bfloat16) for i in range(4)]
    expected = [kernel(**given) for given in many]
    streams = [torch.cuda.Stream() for _ in many]
    graphs: list[tuple[Any, Tensor]] = []
    for given in many[2:]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel(**given)
        graphs.append((graph, out))
    torch.cuda.synchronize()
    for _ in range(200):
        got = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 2:
                    got.append(kernel(**many[i]))
                else:
                    graphs[i - 2][0].replay()
                    got.append(graphs[i - 2][1].clone())
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
