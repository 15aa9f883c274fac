"""What a Bench measures: times, bytes, and that memory ran out."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from archsearch import cost
from archsearch.architecture import Block, ModelSpec
from archsearch.errors import OutOfMemoryError
from archsearch.ffns.swiglu import SwiGLU
from archsearch.latency import measure
from archsearch.latency.measure import Bench, Timing
from archsearch.latency.memory import is_out_of_memory, out_of_memory_named, peak_bytes
from archsearch.mixers.attention import Attention

CPU = torch.device("cpu")


def small(dtype: str = "float32") -> ModelSpec:
    mixers = (Attention(head_dim=16), Attention(head_dim=16, window=8))
    return ModelSpec(64, 32, 50, tuple(Block(mixer, SwiGLU()) for mixer in mixers), dtype=dtype)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with Bench(small(request.param), max_seconds=10.0) as bench:
        yield bench


@pytest.mark.parametrize("what", ["prefill", "decode", "train_step"])
def test_timing(bench: Bench, what: str) -> None:
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    timing = getattr(bench, what)(context=32, batch=2, repeats=6)
    assert timing.n == 6
    assert 3 <= timing.warmup <= 10
    assert 0 < timing.p10 <= timing.p50 <= timing.p90
    assert all(p.dtype == getattr(torch, bench.spec.dtype) for p in bench.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
    assert all(p.grad is None for p in bench.model.parameters())
    assert not bench.model.training


def test_decode_runs_one_token_behind_a_full_cache(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    extend = bench.model.extend

    def spy(tokens: torch.Tensor, state: object) -> torch.Tensor:
        held = [t for block in state.blocks for t in block.values()]  # type: ignore[attr-defined]
        seen.append((tuple(tokens.shape), state.position, all(bool(t.any()) for t in held)))  # type: ignore[attr-defined]
        return extend(tokens, state)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.model, "extend", spy)
    bench.decode(context=20, batch=3, repeats=4)
    assert set(seen) == {((3, 1), 19, True)}


def test_prefill_starts_empty_and_gives_the_next_token(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    extend = bench.model.extend

    def spy(tokens: torch.Tensor, state: object, last_only: bool) -> torch.Tensor:
        at = state.position  # type: ignore[attr-defined]
        logits = extend(tokens, state, last_only)  # type: ignore[arg-type]
        seen.append((tuple(tokens.shape), at, tuple(logits.shape)))
        return logits

    monkeypatch.setattr(bench.model, "extend", spy)
    bench.prefill(context=20, batch=3, repeats=4)
    assert set(seen) == {((3, 20), 0, (3, 1, 50))}


def fake_clock(monkeypatch: pytest.MonkeyPatch, milliseconds: Iterator[float]) -> None:
    """Runs take these times, as the clock on the wall has it too."""
    now = 0.0

    def run_ms(run: Callable[[], object], device: torch.device) -> float:
        nonlocal now
        run()
        taken = next(milliseconds)
        now += taken / 1e3
        return taken

    monkeypatch.setattr(measure, "_wall_ms", run_ms)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)


def test_first_runs_do_not_count_and_the_median_does(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch, iter([90.0, 50.0, 20.0, 10.0, 10.0, 9.0, 10.0, 10.5, 11.0, 13.0]))
    timing = bench.decode(context=8, repeats=5)
    assert timing.to_json() == pytest.approx(
        {"p50": 10.5, "p10": 9.4, "p90": 12.2, "mean": 10.7, "n": 5, "warmup": 5, "graphed": False}
    )


STEADY = [10.0, 10.0, 10.0]  # warm-up


LOUD, LOUDER, QUIET = [8.0, 9.0, 10.0, 14.0, 15.0], [5.0, 9.0, 10.0, 20.0, 30.0], [9.0, 9.0, 10.0, 10.0, 10.0]


@pytest.mark.parametrize(
    ("rounds", "p90"),
    [
        ([QUIET], 10.0),
        ([LOUD, QUIET], 10.0),
        ([LOUDER, LOUD, QUIET], 10.0),
        ([LOUDER, LOUD, LOUDER], 14.6),  # the quietest of them, and no fourth
    ],
)
def test_a_noisy_timing_is_made_again_and_the_quietest_counts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, rounds: list[list[float]], p90: float
) -> None:
    left = iter([ms for runs in rounds for ms in (*STEADY, *runs)])
    fake_clock(monkeypatch, left)
    timing = bench.decode(context=8, repeats=5)
    assert not list(left)
    assert timing.p90 == pytest.approx(p90)
    assert (timing.n, timing.warmup) == (5, 3)
    assert (timing.noise > 0.2) == (p90 > 10)


@pytest.mark.parametrize(("milliseconds", "warmup", "n"), [(1.0, 3, 20), (1000.0, 3, 7), (9000.0, 1, 5)])
def test_a_slow_model_gets_fewer_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, milliseconds: float, warmup: int, n: int
) -> None:
    fake_clock(monkeypatch, itertools.repeat(milliseconds))
    timing = bench.decode(context=8, repeats=20)
    assert (timing.warmup, timing.n) == (warmup, n)


def test_settings_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    during = []
    wall_ms = measure._wall_ms

    def spy(run: Callable[[], object], device: torch.device) -> float:
        during.append((torch.get_num_threads(), gc.isenabled()))
        return wall_ms(run, device)

    monkeypatch.setattr(measure, "_wall_ms", spy)
    before = torch.get_num_threads()
    with Bench(small(), threads=before + 1) as bench:
        bench.decode(context=8, repeats=3)
        assert set(during) == {(before + 1, False)}
        assert (torch.get_num_threads(), gc.isenabled()) == (before, True)
        monkeypatch.setattr(measure, "_wall_ms", lambda run, device: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.decode(context=8)
        assert (torch.get_num_threads(), gc.isenabled()) == (before, True)


def test_state_bytes_are_the_formula(bench: Bench) -> None:
    for context in (4, 32):
        assert bench.state_bytes(context=context, batch=3) == cost.state_bytes(bench.spec, context, batch=3)


def test_closing_frees_the_model() -> None:
    bench = Bench(small())
    model = weakref.ref(bench.model)
    bench.close()
    assert model() is None


def test_functions_measure_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (measure.measure_prefill, measure.measure_decode, measure.measure_train_step):
        timing = function(small(), context=8, batch=1, device="cpu", repeats=3)
        assert timing.n == 3
    assert measure.measure_state_bytes(small(), context=8, batch=2) == cost.state_bytes(small(), 8, batch=2)


def test_timing_survives_json() -> None:
    timing = Timing(1.5, 1.0, 2.0, 1.6, 20, 3)
    assert Timing.from_json(json.loads(json.dumps(timing.to_json()))) == timing


def test_peak_bytes_counts_what_lives_at_once() -> None:
    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes

    def work() -> None:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        a.view(10, 100)  # a view is no memory
        del a, b
        torch.zeros(1500)  # 6000

    assert peak_bytes(model, work, CPU) == 400 + 8000


def test_peak_memory_orders_as_it_must(bench: Bench) -> None:
    weights = cost.params(bench.spec) * cost.DTYPE_BYTES[bench.spec.dtype]
    decode = bench.peak_memory(context=32)
    assert decode >= weights + cost.state_bytes(bench.spec, 32)
    assert bench.peak_memory(context=32, batch=4) > decode
    assert bench.peak_memory(context=32, work="prefill") > decode
    # weights, gradients and two moments, and no more than as much again for the activations of 32 tokens
    assert 4 * weights < bench.peak_memory(context=32, work="train_step") < 8 * weights
    assert bench.peak_memory(context=32) == decode


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_known_in_every_guise(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemoryError), out_of_memory_named("a test"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named("a test"):
        raise RuntimeError("shapes do not match")


def test_a_context_too_long_for_this_machine_is_out_of_memory(bench: Bench) -> None:
    with pytest.raises(OutOfMemoryError, match=r"out of memory during allocating the decode state: .*allocate"):
        bench.state_bytes(context=2**46)
