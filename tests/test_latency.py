"""The device lock between real processes, and what a Bench measures."""

from __future__ import annotations

import gc
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from archsearch import cost
from archsearch.architecture import Block, ModelSpec
from archsearch.errors import OutOfMemoryError
from archsearch.ffns.swiglu import SwiGLU
from archsearch.latency import measure
from archsearch.latency.lock import DeviceLock, device_key, lock_folder
from archsearch.latency.measure import Bench, Timing
from archsearch.latency.memory import is_out_of_memory, out_of_memory_named, peak_bytes
from archsearch.mixers.attention import Attention

Start = Callable[..., subprocess.Popen[bytes]]
CPU = torch.device("cpu")

# what the other processes run; `say` reaches the test at once, `wait` until the test answers
PRELUDE = """
import os, sys, time
from archsearch.latency.lock import DeviceLock
lock = DeviceLock("cpu")
def say(word): print(word, flush=True)
def wait(): sys.stdin.readline()
def log(word):
    with open(sys.argv[1], "a") as file: file.write(f"{os.getpid()} {word}\\n")
"""
TRAINER = """
say("ready")
while True:
    with lock.shared():
        log("enters")
        time.sleep(0.03)
        log("leaves")
"""
HOLDS_SHARED = "with lock.shared(): say('holds'); wait()\nsay('over'); wait()"
HOLDS_EXCLUSIVE = "with lock.exclusive(): say('holds'); wait()\nsay('over'); wait()"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a process that shares a temp folder with this one; what still runs at the end is killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PRELUDE + code, str(tmp_path / "log")]
        # unbuffered, so that what was not read yet is seen by select
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def answer(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")


def is_silent(process: subprocess.Popen[bytes]) -> bool:
    """Nothing heard for a while; a process that should wait fails this if it goes on instead."""
    assert process.stdout is not None
    return not select.select([process.stdout], [], [], 0.2)[0]


def test_a_measurement_waits_for_the_step_to_end(start: Start) -> None:
    trainer = start(HOLDS_SHARED)
    assert heard(trainer) == "holds"
    measurer = start("say('asks')\n" + HOLDS_EXCLUSIVE)
    assert heard(measurer) == "asks"
    assert is_silent(measurer)
    answer(trainer)
    assert heard(measurer) == "holds"


def test_steps_share_and_wait_for_a_measurement(start: Start) -> None:
    trainers = [start(HOLDS_SHARED) for _ in range(2)]
    assert [heard(trainer) for trainer in trainers] == ["holds"] * 2
    for trainer in trainers:
        answer(trainer)
        assert heard(trainer) == "over"
    lock = DeviceLock("cpu")
    with lock.exclusive():
        late = start("say('asks')\n" + HOLDS_SHARED)
        assert heard(late) == "asks"
        assert is_silent(late)
    assert heard(late) == "holds"
    lock.close()


@pytest.mark.timeout(60)
def test_a_stream_of_trainers_starves_no_measurement(start: Start, tmp_path: Path) -> None:
    """Steps overlap without end, so that without the turnstile the device would hardly ever be free."""
    trainers = [start(TRAINER) for _ in range(4)]
    assert [heard(trainer) for trainer in trainers] == ["ready"] * 4
    lock = DeviceLock("cpu")
    with (tmp_path / "log").open("a") as log:
        for _ in range(5):
            time.sleep(0.02)
            print(0, "asks", file=log, flush=True)
            with lock.exclusive():
                print(0, "measures", file=log, flush=True)
                time.sleep(0.01)
                print(0, "is done", file=log, flush=True)
    lock.close()
    stepping: set[str] = set()
    state, steps = "is done", dict.fromkeys(("asks", "measures", "is done"), 0)
    for line in (tmp_path / "log").read_text().splitlines():
        who, what = line.split(maxsplit=1)
        if what == "enters":
            stepping.add(who)
            steps[state] += 1
        elif what == "leaves":
            stepping.remove(who)
        else:
            state = what
            assert state != "measures" or not stepping, "a measurement began within a step"
    assert steps["measures"] == 0, "a step began within a measurement"
    assert steps["is done"] > 0
    assert steps["asks"] < 100, "a measurement waits for one step of each trainer; starving, it waits for many"


@pytest.mark.parametrize("held", [HOLDS_SHARED, HOLDS_EXCLUSIVE], ids=["shared", "exclusive"])
def test_a_killed_holder_lets_go(start: Start, held: str) -> None:
    holder = start(held)
    assert heard(holder) == "holds"
    waiting = start("say('asks')\n" + HOLDS_EXCLUSIVE)
    assert heard(waiting) == "asks"
    assert is_silent(waiting)
    holder.send_signal(signal.SIGKILL)
    assert heard(waiting) == "holds"


def test_a_measurer_killed_in_line_stops_nobody(start: Start) -> None:
    trainer = start(HOLDS_SHARED)
    assert heard(trainer) == "holds"
    in_line = start("say('asks')\n" + HOLDS_EXCLUSIVE)
    assert heard(in_line) == "asks"
    assert is_silent(in_line)
    late = start("say('asks')\n" + HOLDS_SHARED)
    assert heard(late) == "asks"
    assert is_silent(late), "trainers that come later queue behind a measurement"
    in_line.send_signal(signal.SIGKILL)
    assert heard(late) == "holds"


def test_an_error_inside_lets_go(start: Start) -> None:
    lock = DeviceLock("cpu")
    for context in (lock.shared, lock.exclusive):
        with pytest.raises(ZeroDivisionError), context():
            raise ZeroDivisionError
    other = start(HOLDS_EXCLUSIVE)
    assert heard(other) == "holds"
    lock.close()


def test_locks_do_not_nest(start: Start) -> None:
    lock = DeviceLock("cpu")
    for outer in (lock.shared, lock.exclusive):
        for inner in (lock.shared, lock.exclusive):
            with outer(), pytest.raises(AssertionError, match="does not nest"):
                inner().__enter__()
    with lock.exclusive():
        pass
    lock.close()


def test_each_physical_device_has_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_key("cpu") == "cpu"
    assert device_key("cuda:1") == "cuda-GPU-1"
    assert device_key("cuda") == "cuda-GPU-3"
    assert device_key("mps:0") == "mps-0"


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert lock_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "archsearch-12345").mkdir()
    with pytest.raises(PermissionError, match="set TMPDIR"):
        lock_folder()


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
