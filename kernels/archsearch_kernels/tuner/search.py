"""Finds the best configuration of one launch: compile, rank, halve by time, and check before anything may win.

1. Candidates the compiler gets wrong (known_bad) go; all others compile in a pool of processes; what spills, fails or
   does not fit goes.
2. Those left are ranked by how evenly their programs fill the device, and the first few are kept.
3. Successive halving on the device with a cold L2: 3 runs each, drop what is 1.25x the best; 10 runs, keep four; 30
   interleaved runs, keep two. Within 2 % the canonical first wins.
4. The winner has to give the reference's output and gradients, and the same bits twice, and no register may be lost in
   its code; else the next one is asked.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from archsearch_kernels.launch import Config, Launch, choose, forcing
from archsearch_kernels.tuner.compile import Resources, request
from archsearch_kernels.tuner.identity import code_hash, compiler, device
from archsearch_kernels.tuner.known_bad import is_known_bad
from archsearch_kernels.tuner.store import BAD, OK, Row, frozen
from archsearch_kernels.tuner.workload import Workload, distance

QUICK, FULL = 6, 64  # candidates that are timed
TIE = 1.02
HEAD_START = 400_000  # cycles by which the host is ahead of the device: 0.2 ms, lest a busy machine show in the times
MAX_SPILLS = 64  # bytes a thread
DRIVER_SHARED = 1024  # bytes of shared memory that the driver keeps
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # of a multiprocessor since Ampere

_events = 0
_device_us = 0.0


def events() -> int:
    """Launches tuned by this process so far. Nothing that is timed or trained may move it."""
    return _events


def device_us() -> float:
    """Microseconds for which this process kept the device busy with candidates."""
    return _device_us


class Pool(Protocol):
    """Something that compiles: a CompilePool, or the one of another process."""

    def compile(self, requests: Sequence[dict[str, Any]]) -> list[Resources]:
        """What each request takes, or why it does not compile."""


@dataclass
class Candidate:
    """A configuration on its way through the search."""

    position: int
    config: Config
    resources: Resources
    runs_us: list[float]

    @property
    def median(self) -> float:
        """Microseconds."""
        return statistics.median(self.runs_us)


class Search:
    """The search for one launch's configuration: `time`, then `check`. Between the two other launches may be timed.

    limit: how many are timed. known: rows that this launch has already; what they exclude or found slow is left alone,
    and the best of them meets the new candidates. begin: told, as a row, what is about to run for the first time.
    """

    def __init__(
        self,
        launch: Launch,
        workload: Workload,
        pool: Pool,
        *,
        limit: int = QUICK,
        known: Mapping[tuple[tuple[str, int], ...], Row] | None = None,
        begin: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.launch, self.workload, self.pool = launch, workload, pool
        self.limit, self.known, self.begin = limit, known or {}, begin
        self._found = _Rows(launch)
        self._order: list[Candidate] = []
        self._last: list[Candidate] = []  # those that no row has decided when all are timed

    def time(self) -> Iterator[Row]:
        """Rows of those that are out of it: they do not fit, or are slow."""
        global _events
        _events += 1
        candidates = yield from self._fitting()
        candidates.sort(key=lambda c: (-_balance(self.launch, c), c.position))
        kept = candidates[: self.limit]
        for candidate in candidates[self.limit :]:
            yield self._found.row(candidate, "untimed")
        timer = Timer()
        for candidate in kept:
            self.begin(self._found.row(candidate, "crash"))
            self.launch.run(candidate.config)
            torch.cuda.synchronize()
        for runs, survivors, slack in ((3, len(kept), 1.25), (10, 4, 1.25), (30, 2, 1.1)):
            timer.interleave(self.launch, kept, runs)
            kept.sort(key=lambda c: c.median)
            out = [c for c in kept[1:] if c.median > slack * kept[0].median] + kept[survivors:]
            for candidate in {id(c): c for c in out}.values():
                yield self._found.row(candidate, "slow")
            kept = [c for c in kept if all(c is not o for o in out)]
            if len(kept) == 1 and runs >= 10:
                break
        self._last = kept
        # the fastest, the canonical first among ties, until one passes
        self._order = sorted(kept, key=lambda c: (c.median > TIE * kept[0].median, c.position))
        self._order += sorted((c for c in candidates if c.runs_us and c not in kept), key=lambda c: c.median)

    def _fitting(self) -> Generator[Row, None, list[Candidate]]:
        """The candidates that may run; rows of the others."""
        asked = _asked(self.launch, self.known, self.limit)
        requests = [request(self.launch, config, capability(), read_code=False) for _, config in asked]
        fitting: list[Candidate] = []
        for (position, config), resources in zip(asked, self.pool.compile(requests), strict=True):
            candidate = Candidate(position, config, resources, [])
            verdict = _unfit(self.launch, resources, config)
            if verdict is None:
                fitting.append(candidate)
            else:
                yield self._found.row(candidate, verdict)
        return fitting

    @property
    def favourite(self) -> Config | None:
        """What will be checked first; None: nothing was timed."""
        return self._order[0].config if self._order else None

    def check(self) -> Iterator[Row]:
        """Rows of those that were timed, the fastest first, until one is right."""
        expected = self.workload.expected()
        for i, candidate in enumerate(self._order):
            (read,) = self.pool.compile([request(self.launch, candidate.config, capability())])
            if read.error:
                yield self._found.row(replace(candidate, resources=read), "resources")
                continue
            self.begin(self._found.row(candidate, "crash"))
            verdict, error = check(self.launch, candidate.config, self.workload, expected)
            if verdict == OK:
                yield from self._won(i, error)
                return
            yield self._found.row(candidate, verdict, error)

    def accept(self, error: float | None) -> Iterator[Row]:
        """In place of `check`: the favourite was right, with this error."""
        return self._won(0, error)

    def _won(self, i: int, error: float | None) -> Iterator[Row]:
        for other in self._order[i + 1 :]:
            if other in self._last:
                yield self._found.row(other, "slow")
        yield self._found.row(self._order[i], OK, error)


def rounds(searches: Sequence[Search]) -> list[list[Search]]:
    """Searches whose favourites can be checked at once, as few times as it takes: a kernel is forced to one of them."""
    found: list[tuple[dict[str, Config], list[Search]]] = []
    for search in searches:
        name, config = search.launch.kernel.name, search.favourite
        if config is None:
            continue
        forced, members = next((r for r in found if r[0].get(name, config) == config), ({}, []))
        if not members:
            found.append((forced, members))
        forced[name] = config
        members.append(search)
    return [members for _, members in found]


def check_together(searches: Sequence[Search], workload: Workload) -> tuple[str, float | None]:
    """Verdict and largest error of the favourites of one of the `rounds`, all of them in use."""
    with ExitStack() as forced:
        for one in searches:
            assert one.favourite is not None
            forced.enter_context(forcing(one.launch.kernel.name, one.favourite))
        return _judge(workload, workload.expected())


def culprit(launches: Sequence[Launch], workload: Workload) -> Row | None:
    """The row of a configuration in use that makes the workload wrong: with another one for its kernel it is right.

    None if the workload is right as it is. Raises ValueError if no single change of a configuration makes it right:
    tuning would blame whatever it tries.
    """
    expected = workload.expected()
    verdict, error = _judge(workload, expected)
    if verdict == OK:
        return None
    for launch in {x.kernel.name: x for x in launches}.values():
        candidates = list(launch.kernel.configs(launch.arguments))
        used = choose(launch.kernel, launch.key, launch.arguments)
        others = [c for c in candidates if c != used and not is_known_bad(launch.kernel.name, c, device(), compiler())]
        if check(launch, used, workload, expected)[0] == OK:  # it is another one that runs at the small size
            continue
        for config in others:
            if _is_right(launch, config, workload, expected):
                wrong = Candidate(candidates.index(used), used, Resources(), [])
                return _Rows(launch).row(wrong, verdict, error)
    raise ValueError(f"differs from the reference ({verdict}, error {error:.3g}) whatever one configuration is changed")


def _is_right(launch: Launch, config: Config, workload: Workload, expected: Mapping[str, torch.Tensor]) -> bool:
    try:
        return check(launch, config, workload, expected)[0] == OK
    except Exception:  # Triton's own errors have no common base: this one does not fit
        torch.cuda.synchronize()
        return False


def open_candidates(launch: Launch, known: Mapping[tuple[tuple[str, int], ...], Row], limit: int) -> list[Config]:
    """Configurations of a launch that no row decides; a search that times more than a quick one also asks `untimed`.

    As long as none was found right, only what must not run is decided.
    """
    rows = [(config, known.get(frozen(config))) for config in launch.kernel.configs(launch.arguments)]
    decided = {*BAD, OK, "slow"} | ({"untimed"} if limit <= QUICK else set())
    if not any(row is not None and row.verdict == OK for _, row in rows):
        decided = set(BAD)
    return [config for config, row in rows if row is None or row.verdict not in decided]


def _asked(launch: Launch, known: Mapping[tuple[tuple[str, int], ...], Row], limit: int) -> list[tuple[int, Config]]:
    """What is to be timed, with its place among the candidates: all that is open, and the best of what is known."""
    fresh = open_candidates(launch, known, limit)
    checked = [row for row in known.values() if row.verdict == OK]
    best = min(checked, key=lambda row: row.median_us or 0.0).config if checked else None
    numbered = enumerate(launch.kernel.configs(launch.arguments))
    return [(i, config) for i, config in numbered if config in fresh or frozen(config) == best]


def check(
    launch: Launch, config: Config, workload: Workload, expected: Mapping[str, torch.Tensor]
) -> tuple[str, float | None]:
    """Verdict and largest error of a configuration at the workload's small size."""
    with forcing(launch.kernel.name, config):
        return _judge(workload, expected)


def _judge(workload: Workload, expected: Mapping[str, torch.Tensor]) -> tuple[str, float | None]:
    """Verdict and largest error of the workload as it runs now."""
    got, again = workload.check(), workload.check()
    errors = {name: distance(got[name], value) for name, value in expected.items()}
    worst = max(errors.values())
    if any(not e <= workload.allowed(name) for name, e in errors.items()):
        return "wrong", worst
    if not all(torch.equal(got[name], again[name]) for name in got):
        return "nondeterministic", worst
    return OK, worst


def exhaustive(launch: Launch, *, warmup_ms: float = 25.0, repeat_ms: float = 100.0) -> Iterator[tuple[Config, float]]:
    """Every candidate with its median in microseconds, timed as `triton.autotune` does, to hold the search against."""
    timer = Timer()
    for config in launch.kernel.configs(launch.arguments):
        try:
            launch.run(config)
            torch.cuda.synchronize()
        except Exception:  # Triton's own errors have no common base: this one does not fit
            continue
        once = statistics.median(timer.times(launch, config, 5))
        timer.times(launch, config, max(1, round(1e3 * warmup_ms / once)))
        yield config, statistics.median(timer.times(launch, config, max(1, round(1e3 * repeat_ms / once))))


class Timer:
    """Times launches on the device with events, the L2 read over before each: lines written there would have to go to
    memory first, which a model does not make a short kernel wait for."""

    def __init__(self) -> None:
        self.flush = torch.empty(max(2**25, 4 * device().l2_bytes // 4), dtype=torch.int32, device="cuda")

    def times(self, launch: Launch, config: Config, n: int) -> list[float]:
        """Microseconds of `n` launches."""
        global _device_us
        events: list[tuple[Any, Any]] = []
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
        for _ in range(n):
            start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.flush.max()  # also gives the host time to prepare the launch
            start.record()
            launch.run(config)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        runs = [1e3 * start.elapsed_time(end) for start, end in events]
        _device_us += sum(runs)
        return runs

    def interleave(self, launch: Launch, candidates: Sequence[Candidate], n: int) -> None:
        """`n` more runs of each, in turns, so that a change of the clock meets all alike."""
        turns = 1 if n <= 3 else 3
        for _ in range(turns):
            for candidate in candidates:
                candidate.runs_us += self.times(launch, candidate.config, -(-n // turns))


class _Rows:
    """Makes rows of one launch."""

    def __init__(self, launch: Launch) -> None:
        key = launch.key
        self.base = Row(
            op=launch.kernel.op,
            kernel=key.kernel,
            code=code_hash(launch.kernel.python),
            device=device(),
            compiler=compiler(),
            dtypes=key.dtypes,
            flags=key.flags,
            bucket=key.bucket,
            config=(),
            verdict="",
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def row(self, candidate: Candidate, verdict: str, error: float | None = None) -> Row:
        """What became of a candidate."""
        runs = sorted(candidate.runs_us)
        n = len(runs)
        r = candidate.resources
        return replace(
            self.base,
            config=frozen(candidate.config),
            position=candidate.position,
            verdict=verdict,
            median_us=round(candidate.median, 3) if n else None,
            p20_us=round(runs[n // 5], 3) if n else None,
            p80_us=round(runs[4 * n // 5], 3) if n else None,
            n=n,
            registers=r.registers or None,
            spills=r.spills,
            shared=r.shared,
            error=error,
            note=r.error or "",
        )


def capability() -> int:
    """Of the current device, as the compiler counts it: 90 for Hopper."""
    major, _, minor = device().capability.partition(".")
    return 10 * int(major) + int(minor)


def _unfit(launch: Launch, r: Resources, config: Config) -> str | None:
    if is_known_bad(launch.kernel.name, config, device(), compiler()):
        return "wrong"
    if r.error or r.spills > MAX_SPILLS or r.shared > device().shared_bytes - DRIVER_SHARED:
        return "resources"
    return None


def _balance(launch: Launch, candidate: Candidate) -> float:
    """Share of the device's slots that the programs fill, wave by wave, times the share of warps in flight."""
    programs = 1
    for n in launch.grid(candidate.config):
        programs *= n
    r, threads = candidate.resources, 32 * candidate.config.get("num_warps", 4)
    resident = min(
        PROGRAMS,
        THREADS // threads,
        REGISTERS // max(1, r.registers * threads),
        device().shared_bytes // max(1, r.shared + DRIVER_SHARED),
    )
    slots = max(1, resident) * device().processors
    waves = -(-programs // slots)
    return programs / (waves * slots) * min(1.0, max(1, resident) * threads / 512)
