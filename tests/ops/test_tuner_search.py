"""The search on a device of the test's own: what is timed, what may win, what a new candidate costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from demo_kernels import CONFIGS, demo_scale, double
from kernel_checks import DEVICE, randn
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from archsearch_kernels.launch import Config, Launch, forcing, recording
from archsearch_kernels.tuner import search
from archsearch_kernels.tuner.compile import Resources
from archsearch_kernels.tuner.identity import Compiler, Device
from archsearch_kernels.tuner.store import Row, frozen
from archsearch_kernels.tuner.workload import Workload

CARD = Device("Card", "9.0", 132, 52428800, 232448, 80)
MICROSECONDS = {16: 30.0, 32: 10.0, 64: 20.0}  # by BM


class Pool:
    """A compiler that answers from a list."""

    def __init__(self, answers: Mapping[int, Resources] | None = None) -> None:
        self.answers = answers or {}

    def compile(self, requests: Sequence[dict[str, Any]]) -> list[Resources]:
        fine = Resources(registers=40, spills=0, shared=1024)
        return [self.answers.get(CONFIGS.index(r["config"]), fine) for r in requests]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that are timed, in order; times come from a table."""
    seen: list[Config] = []

    class Timer:
        def interleave(self, launch: Launch, candidates: Sequence[search.Candidate], n: int) -> None:
            for c in candidates:
                seen.append(c.config)
                c.runs_us += [MICROSECONDS[c.config["BM"]] + 0.001 * i for i in range(n)]

    monkeypatch.setattr(search, "Timer", Timer)
    monkeypatch.setattr(search, "device", lambda: CARD)
    monkeypatch.setattr(search, "compiler", lambda: Compiler("3.6.0", "12.8"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    return seen


def launch_and_work() -> tuple[Launch, Workload]:
    x, small = randn(100, 64), randn(37, 64, seed=1)
    with recording() as made:
        double(x)
    work = Workload(lambda: double(x), lambda: {"y": double(small)}, lambda: {"y": 2 * small})
    return made[0], work


def tune(launch: Launch, work: Workload, pool: search.Pool, **options: Any) -> Iterator[Row]:
    """Rows of the candidates as they are decided; the checked winner comes last."""
    found = search.Search(launch, work, pool, **options)
    yield from found.time()
    yield from found.check()


def rows(pool: Pool | None = None, **options: Any) -> dict[int, Row]:
    launch, work = launch_and_work()
    found = list(tune(launch, work, pool or Pool(), **options))
    return {row.position: row for row in found}  # the last row of a configuration counts


def test_the_fastest_that_is_right_wins(timed: list[Config]) -> None:
    before = search.events()
    found = rows()
    assert {i: r.verdict for i, r in found.items()} == {0: "slow", 1: "ok", 2: "slow", 3: "slow"}
    assert found[1].error is not None
    assert found[1].error < 1e-6
    assert found[1].n == 13
    assert found[0].n == 3  # dropped after three runs
    assert search.events() == before + 1


def test_a_wrong_configuration_may_not_win(timed: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MICROSECONDS, 64, 1.0)
    found = rows()
    assert found[2].verdict == "ok"  # same block, so a tie: the canonical one is asked first
    monkeypatch.setattr(demo_scale, "configs", lambda arguments: [CONFIGS[3], CONFIGS[1], CONFIGS[0]])
    found = {row.config: row for row in rows().values()}
    wrong = found[frozen(CONFIGS[3])]
    assert wrong.verdict == "wrong"
    assert wrong.error is not None
    assert wrong.error > 0.1
    assert found[frozen(CONFIGS[1])].verdict == "ok"


def test_what_changes_between_runs_may_not_win(timed: list[Config]) -> None:
    launch, _ = launch_and_work()
    turn = iter(range(1000))
    work = Workload(lambda: None, lambda: {"y": torch.full((4,), 1 + 1e-6 * next(turn))}, lambda: {"y": torch.ones(4)})
    assert all(row.verdict in ("nondeterministic", "slow") for row in tune(launch, work, Pool()))


def test_nan_is_wrong(timed: list[Config]) -> None:
    launch, _ = launch_and_work()
    work = Workload(lambda: None, lambda: {"y": torch.full((4,), float("nan"))}, lambda: {"y": torch.ones(4)})
    verdicts = {row.verdict for row in tune(launch, work, Pool())}
    assert "ok" not in verdicts
    assert "wrong" in verdicts


def test_each_number_may_have_a_tolerance_of_its_own(timed: list[Config]) -> None:
    launch, _ = launch_and_work()
    got = {"a": torch.full((4,), 1.1), "b": torch.full((4,), 1.0)}
    for tolerance, verdict in (({"a": 0.2, "b": 0.01}, "ok"), ({"a": 0.01, "b": 0.2}, "wrong")):
        work = Workload(lambda: None, lambda: got, lambda: dict.fromkeys("ab", torch.ones(4)), tolerance)
        assert search.check(launch, CONFIGS[0], work, work.expected())[0] == verdict


def test_what_spills_or_does_not_fit_is_never_run(timed: list[Config]) -> None:
    pool = Pool({0: Resources(255, 600, 1024), 1: Resources(40, 0, 300_000), 3: Resources(error="no")})
    found = rows(pool)
    assert {i: r.verdict for i, r in found.items()} == {0: "resources", 1: "resources", 2: "ok", 3: "resources"}
    assert {c["BM"] for c in timed} == {64}
    assert found[3].note == "no"


def test_a_quick_search_leaves_the_unlikely_for_later(timed: list[Config]) -> None:
    found = rows(limit=2)
    assert sorted(r.verdict for r in found.values()) == ["ok", "slow", "untimed", "untimed"]
    known = {row.config: row for row in found.values()}
    launch, _ = launch_and_work()
    assert search.open_candidates(launch, known, search.QUICK) == []
    later = search.open_candidates(launch, known, search.FULL)
    assert {frozen(c) for c in later} == {r.config for r in known.values() if r.verdict == "untimed"}


def test_a_new_candidate_costs_one_row(timed: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    known = {row.config: row for row in rows().values()}
    timed.clear()
    new = {"BM": 32, "OFF": 0, "num_warps": 8, "num_stages": 2}
    monkeypatch.setattr(demo_scale, "configs", lambda arguments: [*CONFIGS, new])
    launch, work = launch_and_work()
    pool = Pool()
    pool.compile = lambda requests: [Resources(registers=40)] * len(requests)  # type: ignore[method-assign]
    found = list(tune(launch, work, pool, known=known))
    assert {frozen(c) for c in timed} == {frozen(CONFIGS[1]), frozen(new)}  # it, and the one to beat
    # a tie: the canonical one wins, and the other one is not asked again
    assert {row.config: row.verdict for row in found} == {frozen(CONFIGS[1]): "ok", frozen(new): "slow"}
    known |= {row.config: row for row in found}
    assert search.open_candidates(launch, known, search.QUICK) == []


def test_configurations_that_killed_a_process_stay_away(timed: list[Config]) -> None:
    known = {frozen(CONFIGS[1]): next(r for r in rows().values() if r.position == 1)}
    known = {config: Row(**{**vars(row), "verdict": "crash"}) for config, row in known.items()}
    timed.clear()
    found = rows(known=known)
    assert 1 not in found
    assert CONFIGS[1] not in timed


def test_what_is_about_to_run_is_announced(timed: list[Config]) -> None:
    announced: list[Row] = []
    rows(begin=announced.append)
    assert {row.position for row in announced} == {0, 1, 2, 3}
    assert {row.verdict for row in announced} == {"crash"}


def test_the_configuration_that_makes_a_workload_wrong_is_found(
    timed: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, work = launch_and_work()
    assert search.culprit([launch], work) is None
    wrong_first = [CONFIGS[3], *CONFIGS[:2]]
    monkeypatch.setattr(demo_scale, "configs", lambda arguments: wrong_first)
    demo_scale.forget()
    launch, work = launch_and_work()
    row = search.culprit([launch], work)
    demo_scale.forget()
    assert row is not None
    assert (row.config, row.verdict) == (frozen(CONFIGS[3]), "wrong")
    monkeypatch.setattr(demo_scale, "configs", lambda arguments: [CONFIGS[3]])
    launch, work = launch_and_work()
    with pytest.raises(ValueError, match=r"differs from the reference \(wrong"):
        search.culprit([launch], work)
    demo_scale.forget()


def test_forcing_and_recording() -> None:
    x = randn(20, 64)
    with forcing("demo_scale", CONFIGS[3]):
        assert torch.equal(double(x), 2 * x + 1)
    with recording() as made:
        y = double(x)
    assert torch.equal(y, 2 * x)
    y.zero_()
    made[0].run(CONFIGS[1])
    assert torch.equal(y, 2 * x)
    assert made[0].key.bucket == (("T", 32),)
    assert y.device.type == DEVICE


def test_launches_told_alike_have_one_key_and_one_compiled_kernel() -> None:
    """What a launch finds its compiled kernel by is equal only where Triton and the tables find the same."""
    target = GPUTarget("cuda", 90, 32)
    jitted = JITFunction(demo_scale.python)
    bind = create_function_from_signature(jitted.signature, jitted.params, make_backend(target))
    x, half = torch.zeros(64), torch.zeros(64, dtype=torch.float16)
    values = [x, x[4:], x[1:], half, half[8:], half[2:], None, 0, 1, 2, 16, 17, -16, -(2**31), 2**31, 2**40, 1.5, 2.5]
    base = {"x": x, "y": x, "T": 4, "D": 8}
    made = [(base | {name: value}, {"T": size}) for name in ("x", "y", "T") for value in values for size in (3, 4, 5)]
    made += [(base | {"D": D}, {"T": 4}) for D in (8, 16, None)]
    exact = [demo_scale._exactly(*launch, x.device) for launch in made]
    found = [(demo_scale.key(*launch), [str(part) for part in bind(**launch[0], BM=16, OFF=0)[1]]) for launch in made]
    pairs = [(i, j) for i in range(len(made)) for j in range(i) if exact[i] == exact[j]]
    assert len(pairs) > len(made)
    for i, j in pairs:
        assert found[i] == found[j]
    assert demo_scale._exactly(base | {"T": True}, {"T": 4}, x.device) is None


def test_programs_that_fill_the_device_rank_first() -> None:
    launch, _ = launch_and_work()

    def balance(programs: int, monkey: Any) -> float:
        candidate = search.Candidate(0, CONFIGS[0], Resources(registers=64, shared=40_000), [])
        monkey.setattr(search, "device", lambda: CARD)
        return search._balance(Launch(launch.kernel, lambda c: (programs,), {}, launch.key), candidate)

    with pytest.MonkeyPatch.context() as monkey:
        full, one_more = balance(132 * 5, monkey), balance(132 * 5 + 1, monkey)
    assert full > 1.5 * one_more
