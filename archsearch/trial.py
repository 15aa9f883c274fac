"""One trial: time an architecture at target scale, then train and judge it at proxy scale. All that a worker runs.

`run_trial(job, report) -> outcome`: plain data in, plain data out. It can stop at a rung, leave a checkpoint and go
on later in another process. What fails is an outcome with its reason and traceback, never an exception.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from archsearch import checkpoint as checkpoints
from archsearch import cost, machine
from archsearch.architecture import Architecture, ModelSpec
from archsearch.data import Corpus, open_corpus
from archsearch.errors import OutOfMemoryError, TrialError
from archsearch.latency.lock import DeviceLock
from archsearch.latency.measure import Bench
from archsearch.latency.memory import is_out_of_memory
from archsearch.latency.room import bench_bytes, too_big, train_bytes
from archsearch.model import HybridLM, build_model, num_params
from archsearch.objectives import axis_name, beyond, exceeds, in_doubt, objective, scale_of
from archsearch.settings import Goal, Task, Train
from archsearch.store.disk import refused
from archsearch.train import evaluate, train

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRESS_SECONDS = 0.5
AGAIN = 2  # so often a value is measured anew whose noise may have put it beyond its limit

Report = Callable[[Mapping[str, Any]], None]


@dataclass
class _Outcome:
    """What goes back to the driver; see `archsearch.store.TrialRecord` for the fields' meaning."""

    status: str = "complete"
    reason: str | None = None
    message: str | None = None
    traceback: str | None = None
    objectives: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    device: str | None = None

    def add(self, what: str, seconds: float) -> None:
        """Add to `seconds[what]`."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds[what]`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - began)


class MiscountError(TrialError):
    """A spec's count of parameters is not its module's."""

    reason = "exception"


class _LimitExceeded(TrialError):
    reason = "limit"


def tuning_events() -> int:
    """Launches that this process has tuned: none, if whoever started it tuned before."""
    search = sys.modules.get("archsearch_kernels.tuner.search")
    return 0 if search is None else int(search.events())


def run_trial(job: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Run one job to its rung.

    job: `architecture`, `train`, `task`, `goals` (all as JSON), `base_dir`, `corpus_sha256`, `device`, `repeats`,
    `until_tokens` (where to stop), `checkpoint` (path to resume from and save to, or null), `keep` (whether to leave
    the last checkpoint there when the budget is used up), `timed` (the bench objectives are known already), perhaps
    `kind` (the device that objectives name: those of others are not measured here). Returns the outcome as plain data;
    status is complete, paused (stopped at a rung), measured (until_tokens is 0: nothing was trained), infeasible, or
    unwritable (a disk takes no more; `message` says which and what to do).
    """
    outcome = _Outcome(device=_device_name(job["device"]))
    began = time.perf_counter()
    try:
        _run(job, outcome, report)
    except TrialError as error:
        outcome.status, outcome.reason, outcome.message = "infeasible", error.reason, str(error)
        if not isinstance(error, _LimitExceeded):
            outcome.traceback = traceback.format_exc()
    except Exception as error:
        if (why := refused(error)) is not None:  # says nothing of the candidate: the study stops
            outcome.status, outcome.message = "unwritable", why
        else:  # recorded whole, never silent: the study goes on
            oom = is_out_of_memory(error)
            outcome.status, outcome.reason = "infeasible", OutOfMemoryError.reason if oom else "exception"
            outcome.message, outcome.traceback = f"{type(error).__name__}: {error}", traceback.format_exc()
    outcome.seconds["total"] = time.perf_counter() - began
    outcome.metrics["tuning_events"] = float(tuning_events())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return asdict(outcome)


def _run(job: Mapping[str, Any], outcome: _Outcome, report: Report) -> None:
    architecture = Architecture.from_json(job["architecture"])
    goals = tuple(Goal.model_validate(goal) for goal in job["goals"])
    lock = DeviceLock(job["device"])
    if not job["timed"]:
        report({"phase": "latency"})
        _measure(architecture, goals, job, lock, outcome)
    if job["until_tokens"] == 0:
        outcome.status = "measured"
        return
    trained = [goal for goal in goals if objective(goal).stage == "trained"]
    if not trained:
        return
    report({"phase": "train", "tokens": 0})
    with outcome.timed("data"):
        corpus = open_corpus(
            Task.model_validate(job["task"]),
            Path(job["base_dir"]) if job["base_dir"] else None,
            expect_sha256=job["corpus_sha256"],
        )
    _train(architecture, corpus, job, lock, outcome, report)
    for goal in trained:
        _read(goal, goals, outcome.metrics, job["repeats"], outcome)


def _measure(
    architecture: Architecture, goals: tuple[Goal, ...], job: Mapping[str, Any], lock: DeviceLock, outcome: _Outcome
) -> None:
    """Bench objectives, one model build per scale, while nobody trains on the device."""
    here = (None, job.get("kind"))
    wanted = [goal for goal in goals if objective(goal).stage == "bench" and goal.at.device in here]
    for scale in dict.fromkeys(scale_of(goal) for goal in wanted):
        asked, model = time.perf_counter(), architecture.at(scale)
        here_goals = [goal for goal in wanted if scale_of(goal) == scale]
        with lock.exclusive():
            outcome.add("wait", time.perf_counter() - asked)
            for goal in here_goals:
                least = bench_bytes(model, goal.name, goal.at.context, goal.at.batch)
                _refuse_without_room(model, f"{goal.name} at {scale} scale", least, job["device"])
            with outcome.timed("latency"), Bench(model, device=job["device"]) as bench:
                for goal in here_goals:
                    _read(goal, goals, bench, job["repeats"], outcome)


def _refuse_without_room(model: ModelSpec, what: str, least: int, device: str) -> None:
    """Raise OutOfMemoryError, before any tensor is made, if the device has less than `least` bytes."""
    if device.startswith("cuda"):
        room: int | None = torch.cuda.get_device_properties(device).total_memory
    else:
        room = machine.free_memory()
    if room is not None and least > room:
        raise OutOfMemoryError(too_big(model, what, least, room))


def _read(goal: Goal, goals: tuple[Goal, ...], source: Any, repeats: int, outcome: _Outcome) -> None:
    """Read one objective into the outcome; raises _LimitExceeded beyond its limit.

    What was measured and is in doubt is measured anew, at most AGAIN times, each with twice the repeats; of these
    readings the one of the least spread counts, whether it lies within the limit or not.
    """
    found = objective(goal)
    reading, times = found.read(source, goal, repeats), 1
    while found.stage == "bench" and times <= AGAIN and in_doubt(goal, reading):
        anew = found.read(source, goal, repeats * 2**times)
        reading, times = min(reading, anew, key=lambda each: each.spread or 0.0), times + 1
    name = axis_name(goal, goals)
    outcome.objectives[name] = asdict(reading)
    if exceeds(goal, reading.value):
        raise _LimitExceeded(
            beyond(goal, name, reading.value, reading.spread) + (f", measured {times} times" if times > 1 else "")
        )


def _train(
    architecture: Architecture,
    corpus: Corpus,
    job: Mapping[str, Any],
    lock: DeviceLock,
    outcome: _Outcome,
    report: Report,
) -> None:
    """Train to `until_tokens`, leaving a checkpoint about every minute, and judge on held-out text."""
    spec, settings = architecture.at("proxy"), Train.model_validate(job["train"])
    path = Path(job["checkpoint"]) if job["checkpoint"] else None
    _refuse_without_room(spec, "training at proxy scale", train_bytes(spec), job["device"])
    with outcome.timed("build"):
        model = build_model(spec, seed=settings.seed, device=job["device"])
        _check_count(model, spec)
        resume = checkpoints.load(path, job["device"]) if path is not None and path.exists() else None
    last_report = 0.0

    def on_step(step: int, tokens: int, loss: float) -> None:
        nonlocal last_report
        if (now := time.monotonic()) - last_report > PROGRESS_SECONDS:
            last_report = now
            report({"phase": "train", "tokens": tokens, "loss": loss})

    def save(standing: checkpoints.Checkpoint) -> None:
        assert path is not None
        with lock.shared(), outcome.timed("save"):  # it copies from the device
            checkpoints.save(path, standing)

    began = time.perf_counter()
    try:
        result = train(
            model,
            spec,
            corpus,
            settings,
            device=job["device"],
            until_tokens=job["until_tokens"],
            resume=resume,
            lock=lock,
            on_step=on_step,
            save=None if path is None else save,
        )
    finally:
        outcome.add("train", time.perf_counter() - began - outcome.seconds.get("save", 0.0))
    if path is not None and not result.finished:
        save(result.checkpoint)
    elif path is not None and job["keep"]:
        save(result.checkpoint.of_the_end())
    with outcome.timed("validate"):
        outcome.metrics.update(evaluate(model, spec, corpus, settings, device=job["device"], lock=lock))
    outcome.metrics["tokens_per_s"] = result.tokens_per_s
    outcome.metrics["peak_memory_bytes"] = float(result.peak_memory_bytes)
    outcome.curve = [(at, loss) for at, loss in result.curve]
    outcome.tokens = result.tokens
    outcome.status = "complete" if result.finished else "paused"


def _check_count(model: HybridLM, spec: ModelSpec) -> None:
    """Raise MiscountError if a mixer or FFN of somebody else has not as many parameters as its spec says."""
    found, said = num_params(model), cost.params(spec)
    if found != said:
        others = {kind for b in spec.blocks if not b.is_built_in for kind in (b.mixer.kind, b.ffn.kind)}
        kinds = ", ".join(sorted(others)) or "a kind of archsearch"
        raise MiscountError(f"the model has {found:,} parameters, its specs count {said:,}: see num_params of {kinds}")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
