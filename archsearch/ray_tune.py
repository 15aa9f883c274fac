"""A space inside Ray Tune: a searcher and a trainable, for people whose pipelines have schedulers and loggers there.

`archsearch launch --runner ray` is the faster way and the one that keeps records; this one brings what Tune has. The
searcher is one of our own and not Tune's OptunaSearch, because that tells the sampler of trials that a scheduler
stopped early as if they had been trained to their end.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from archsearch.architecture import dump, identity
from archsearch.errors import RunError, SpaceError
from archsearch.objectives import axis_name, devices_of, direction, exceeds, objective, scale_of
from archsearch.space import Candidate, SearchSpace
from archsearch.study.journal import Journal

MAX_FRUITLESS = 2000  # candidates in a row that are refused or known before the space counts as exhausted
BUDGET, TOKENS = "budget_tokens", "tokens"  # keys of a result


@dataclass(frozen=True)
class TunePair:
    """What a `tune.Tuner` needs. metrics and modes: the objectives as Tune names and orders them."""

    searcher: SpaceSearcher
    trainable: Any
    metrics: tuple[str, ...]
    modes: tuple[str, ...]


def tune_search_space(
    space: SearchSpace | str | Path, *, reports: int = 4, cpus: float = 1.0, gpus: float = 0.0
) -> TunePair:
    """The searcher and the trainable of a space (or of its file).

    reports: how often a trial tells Tune its objectives, at equal shares of train.tokens; a scheduler decides there.
    cpus, gpus: of each trial.
    """
    loaded = space if isinstance(space, SearchSpace) else SearchSpace.load(Path(space))
    if named := devices_of(loaded.objectives):
        raise RunError(
            f"an objective is to be measured on {named[0]}, which Tune cannot arrange; use archsearch launch"
        )
    searcher = SpaceSearcher(loaded, reports, "cuda:0" if gpus else "cpu")
    trainable = tune.with_resources(train_candidate, {"cpu": cpus, "gpu": gpus})
    return TunePair(searcher, trainable, searcher.axes, searcher.directions)


class SpaceSearcher(Searcher):  # type: ignore[misc]
    """Samples a space with its own sampler; rules and known candidates cost no trial.

    A trial that a scheduler stopped before its budget is told as stopped, one that failed as infeasible. Its state is
    the study's journal and a few numbers, as JSON.
    """

    def __init__(self, space: SearchSpace, reports: int, device: str) -> None:
        goals = space.objectives
        self.axes = tuple(axis_name(goal, goals) for goal in goals)
        self.directions = tuple(direction(goal) for goal in goals)
        super().__init__(metric=list(self.axes), mode=list(self.directions))
        self.space, self.reports, self.device = space, reports, device
        self.numbers: dict[str, int] = {}  # Tune's trial id to the sampler's number
        self.seen: set[str] = set()
        self._open("")

    def _open(self, journal: str) -> None:
        folder = tempfile.mkdtemp(prefix="archsearch-tune-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.file = Path(folder) / "study.journal"
        if journal:
            self.file.write_text(journal)
        rules = [rule.text for rule in self.space.rules]
        self.journal = Journal(self.file, list(self.directions), self.space.search, rules)

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        """The space has its own objectives and holes; a param_space beside it is refused."""
        return not config

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """A candidate as a config: its holes by name, and the job as JSON."""
        for _ in range(MAX_FRUITLESS):
            number, chooser = self.journal.ask(len(self.seen))
            try:
                candidate = self.space.sample(chooser)
            except SpaceError:  # options that make no layout together
                self.journal.tell_infeasible(number)
                continue
            key = candidate.architecture.arch_id + identity(dump(candidate.train))
            refusal = self.space.refusal(candidate)
            if refusal is not None:
                self.journal.tell_infeasible(number, refusal.violations)
            elif key in self.seen:
                self.journal.tell_failed(number)
            else:
                self.seen.add(key)
                self.numbers[trial_id] = number
                return {**candidate.holes, "arch_id": candidate.architecture.arch_id, "job": self._job(candidate)}
        return str(Searcher.FINISHED)

    def _job(self, candidate: Candidate) -> str:
        goals, readings = self.space.objectives, {}
        for goal, axis in zip(goals, self.axes, strict=True):
            found = objective(goal)
            if found.stage == "graph":
                readings[axis] = found.read(candidate.architecture.at(scale_of(goal)), goal, 1).value
                if exceeds(goal, readings[axis]):
                    readings[axis] = math.inf  # the trial says so and ends
        return json.dumps(
            {
                "architecture": candidate.architecture.to_json(),
                "train": dump(candidate.train),
                "task": dump(self.space.task),
                "goals": [goal.model_dump(mode="json", exclude_defaults=True) for goal in goals],
                "base_dir": str(Path(self.space.base_dir).absolute()),
                "corpus_sha256": None,
                "device": self.device,
                "repeats": self.space.runtime.latency_repeats,
                "tokens": candidate.train.tokens,
                "reports": self.reports,
                "readings": readings,
            }
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the sampler how it ended."""
        number = self.numbers.pop(trial_id, None)
        if number is None:
            return
        if error or result is None or any(not math.isfinite(result.get(axis, math.nan)) for axis in self.axes):
            self.journal.tell_infeasible(number)
        elif result[TOKENS] < result[BUDGET]:
            self.journal.tell_stopped(number)
        else:
            self.journal.tell(number, [result[axis] for axis in self.axes])

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON."""
        Path(checkpoint_path).write_text(json.dumps(self._state()))

    def restore(self, checkpoint_path: str) -> None:
        """Go on from what `save` wrote. Raises RunError if that was something else."""
        try:
            state = json.loads(Path(checkpoint_path).read_text())
            self.numbers, self.seen = dict(state["numbers"]), set(state["seen"])
            self._open(state["journal"])
        except (ValueError, KeyError) as error:
            raise RunError(f"{checkpoint_path} is not the state of a space's searcher: {error}") from error

    def _state(self) -> dict[str, Any]:
        journal = self.file.read_text() if self.file.exists() else ""
        return {"journal": journal, "numbers": self.numbers, "seen": sorted(self.seen)}

    def __getstate__(self) -> dict[str, Any]:
        """Plain data: Tune pickles the searcher with the Tuner."""
        space = {"text": self.space.source.text, "base_dir": str(self.space.base_dir)}
        return {"space": space, "reports": self.reports, "device": self.device, **self._state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        space = SearchSpace.from_text(state["space"]["text"], base_dir=Path(state["space"]["base_dir"]))
        SpaceSearcher.__init__(self, space, state["reports"], state["device"])
        self.numbers, self.seen = dict(state["numbers"]), set(state["seen"])
        self._open(state["journal"])


def train_candidate(config: dict[str, Any]) -> None:
    """The trainable: times and trains one candidate, reporting every objective with a checkpoint at each share.

    Raises RunError (Tune shows the trial as failed) with the reason where a candidate is infeasible.
    """
    from archsearch.trial import run_trial

    job = json.loads(config["job"])
    if over := [axis for axis, value in job["readings"].items() if value == math.inf]:
        raise RunError(f"limit: {over[0]} is beyond its limit")
    readings = dict(job["readings"])
    with tempfile.TemporaryDirectory(prefix="archsearch-trial-") as folder:
        file, first = Path(folder) / "trial.safetensors", 0
        if (known := tune.get_checkpoint()) is not None:
            with known.as_directory() as place:
                file.write_bytes((Path(place) / file.name).read_bytes())
                state = json.loads((Path(place) / "state.json").read_text())
            first, readings = state["reports"], state["readings"]
        for share in range(first + 1, job["reports"] + 1):
            until = job["tokens"] * share // job["reports"]
            order = {**job, "job": 0, "until_tokens": until, "checkpoint": str(file), "keep": True, "timed": share > 1}
            outcome = run_trial(order, lambda progress: None)
            if outcome["status"] == "infeasible":
                raise RunError(f"{outcome['reason']}: {outcome['message']}")
            if outcome["status"] == "unwritable":
                raise RunError(outcome["message"])
            readings |= {axis: reading["value"] for axis, reading in outcome["objectives"].items()}
            (Path(folder) / "state.json").write_text(json.dumps({"reports": share, "readings": readings}))
            done = outcome["status"] == "complete"
            tokens = {TOKENS: job["tokens"] if done else until, BUDGET: job["tokens"]}
            metrics = {**readings, **tokens, "trained_tokens": outcome["tokens"], "curve_loss": outcome["curve"][-1][1]}
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
