"""The driver's loop: ask -> refuse or run -> record -> tell, resumable after a kill at any moment.

Order of truth: the records of trials that ran are on the disk before the sampler is told, so whatever the journal knows
is in trials.jsonl; on the next start open journal trials are told from their records or run again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from archsearch.architecture import dump
from archsearch.errors import RunError, SpaceError
from archsearch.objectives import axis_name, beyond, devices_of, direction, exceeds, objective, read_layout
from archsearch.rungs import Rungs
from archsearch.runners import Event, Runner
from archsearch.settings import Goal
from archsearch.space import SearchSpace
from archsearch.store import RunFolder, TrialRecord
from archsearch.study.candidates import Trial, make_record, now, was_run
from archsearch.study.checkpoints import prune_checkpoints
from archsearch.study.journal import Journal
from archsearch.study.resume import resume

MAX_REFUSALS = 2000  # asks in a row without a new candidate before the space counts as exhausted
MAX_DUPLICATES = 300
AHEAD = 8  # so many trials may wait for one kind of device before another kind asks for more
BATCH = 16  # so many trials are asked for at most before the first of them starts
MAX_MOVES = 20  # nodes that a trial may lose before it is recorded


class Listener:
    """Hears what happens; the CLI's progress display is one. All methods may be left out."""

    def started(self, study: Study) -> None:
        """The loop is about to begin."""

    def running(self, study: Study, trial: Trial, progress: Mapping[str, Any]) -> None:
        """A trial reported its phase, tokens or loss."""

    def recorded(self, study: Study, record: TrialRecord) -> None:
        """A trial ended."""

    def note(self, message: str) -> None:
        """Something a person should know."""


class Study:
    """Runs a space in a run folder with a runner. The caller holds the folder's lock.

    corpus_sha256: workers with other data refuse. device: what workers train and time on. n_trials: how many sampled
    candidates to run (search.trials if None).
    """

    def __init__(
        self,
        space: SearchSpace,
        folder: RunFolder,
        runner: Runner,
        *,
        device: str,
        corpus_sha256: str | None,
        n_trials: int | None = None,
        listener: Listener | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.space, self.folder, self.runner = space, folder, runner
        self.device, self.corpus_sha256 = device, corpus_sha256
        self.n_trials = space.search.trials if n_trials is None else n_trials
        self.listener = listener or Listener()
        self.goals: tuple[Goal, ...] = space.objectives
        self.kinds: tuple[str | None, ...] = devices_of(self.goals) or (None,)
        self.axes = [axis_name(goal, self.goals) for goal in self.goals]
        self.directions = [direction(goal) for goal in self.goals]
        rules = [rule.text for rule in space.rules]
        self.journal = Journal(folder.path / "study.journal", self.directions, space.search, rules)
        self.records: dict[int, TrialRecord] = {record.trial: record for record in folder.records()}
        self.n_recorded = sum(_counts(record) for record in self.records.values())
        self.active: dict[int, Trial] = {}
        self.waiting: list[Trial] = []  # ready to run, in order
        self.paused: dict[int, Trial] = {}  # stopped at a rung
        self.going: set[int] = set()  # sampled trials among these three
        self.untold: list[Callable[[], None]] = []  # results that are recorded, for the sampler
        self.seen: dict[str, int] = {}
        self.last_id = -1
        self.rungs = Rungs(len(space.search.rungs), space.search.keep)
        self.fruitless = 0
        self.unmade = Counter[str]()  # why options made no candidate
        self.prune_at = 0.0
        self.duplicates_in_row = 0
        self.exhausted: str | None = None
        self.unwritable: str | None = None  # where a disk takes no more
        self.began = clock()
        self.started_at = now()
        self.clock = clock

    # ---- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until every trial of the budget has a record. KeyboardInterrupt leaves a folder that resumes.

        Raises RunError where a disk takes no more; its trials have no record, and run when the study goes on.
        """
        self.listener.started(self)
        interrupted = resume(self)
        if interrupted is not None:
            self.listener.note(interrupted)
        while True:
            while self._submit_some():
                continue
            if not self.active:
                break
            for event in self.runner.wait(1.0):
                self._handle(event)
            self._settle()
            if self.unwritable is not None:
                raise RunError(self.unwritable)
        self._stop_paused()
        self.folder.sync()
        self.journal.sync()

    def _submit_some(self) -> bool:
        """Start what there is room for, a few at a time, so that the disk is waited for once and not for each."""
        ready: list[Trial] = []
        for kind in self.kinds:
            room = min(self.runner.free() if kind is None else self.runner.free(kind), BATCH) + len(ready)
            while len(ready) < room and (trial := self._next(kind)) is not None:
                trial.kind = kind
                ready.append(trial)
        if ready:
            self.folder.sync()
            self.journal.sync()
        for trial in ready:
            self._submit(trial)
        return bool(ready)

    def _settle(self) -> None:
        """Results are on the disk before the sampler hears of them."""
        self.folder.sync()
        for tell in self.untold:
            tell()
        self.untold.clear()

    @property
    def n_run(self) -> int:
        """Sampled candidates that were run or are running (duplicates and refused ones do not count)."""
        return self.n_recorded + len(self.going)

    def _next(self, kind: str | None) -> Trial | None:
        """What a device of this kind can do now. If objectives name several kinds, a trial is measured once on each of
        them and then trained on any: the rarest must not have to train them all.
        """
        for at, ready in enumerate(self.waiting):
            if ready.timed or kind not in ready.measured:
                return self.waiting.pop(at)
        if (promotion := self.rungs.next()) is not None:
            trial, rung = promotion
            self.rungs.promote(trial, rung)
            going = self.paused.pop(trial)
            going.rung = rung + 1
            return going
        if self.n_run < self.n_trials and self.exhausted is None and len(self.waiting) < AHEAD:
            return self._ask()
        return None

    def _ask(self) -> Trial | None:
        while self.exhausted is None and self.n_run < self.n_trials:  # one beyond a limit uses up budget too
            number, chooser = self.journal.ask(self._new_id())
            trial_id = self.last_id
            try:
                candidate = self.space.sample(chooser)
            except SpaceError as error:  # options that make no layout together: nothing to record
                self.journal.tell_infeasible(number)
                self.unmade[str(error)] += 1
                self._count_fruitless()
                continue
            trial = Trial(trial_id, candidate, number, started=now())
            if self._admit(trial):
                self.going.add(trial.trial)
                return trial
        return None

    def _admit(self, trial: Trial) -> bool:
        """Whether a candidate is worth running; what is not is recorded and told here."""
        refusal = self.space.refusal(trial.candidate)
        if refusal is not None:
            self._record(trial, "infeasible", reason=refusal.reason, message=refusal.message, with_architecture=False)
            if trial.number is not None:
                self.journal.tell_infeasible(trial.number, refusal.violations)
            self._count_fruitless()
            return False
        if trial.number is not None and (twin := self.seen.get(trial.key)) is not None:
            self.duplicates_in_row += 1
            self._copy(trial, twin)
            if self.duplicates_in_row >= MAX_DUPLICATES:
                self._exhaust(f"the last {self.duplicates_in_row} candidates were all known: the space seems exhausted")
            return False
        over = self._read_graph(trial)
        self.seen[trial.key] = trial.trial
        if over is not None:
            self._fail(trial, "limit", over)
            self._settle()
            return False
        self.fruitless = self.duplicates_in_row = 0
        return True

    def _count_fruitless(self) -> None:
        self.fruitless += 1
        if self.fruitless >= MAX_REFUSALS:
            self._exhaust(f"{self.fruitless} candidates in a row were refused")

    def _exhaust(self, why: str) -> None:
        self.exhausted = why
        self.listener.note(f"{why}; no more candidates are asked for")
        if not self.seen:
            reasons = self.unmade + Counter(
                r.message or "" for r in self.records.values() if r.reason in ("rule", "graph")
            )
            raise RunError(f"no candidate passed the rules; most often: {reasons.most_common(1)[0][0]}")

    def _read_graph(self, trial: Trial) -> str | None:
        """Objectives that need no tensor; returns what is beyond its limit, if anything."""
        for goal, axis in zip(self.goals, self.axes, strict=True):
            if objective(goal).stage == "graph" and axis not in trial.readings:
                reading = read_layout(goal, trial.candidate.architecture)
                trial.readings[axis] = {"value": reading.value, "spread": reading.spread, "n": reading.n}
                if exceeds(goal, reading.value):
                    return beyond(goal, axis, reading.value)
        return None

    def _submit(self, trial: Trial) -> None:
        runtime = self.space.runtime
        trial.attempts += 1
        trial.started = trial.started or now()
        self.active[trial.trial] = trial
        checkpoint = self.folder.path / "checkpoints" / f"{trial.trial}.safetensors"
        checkpoint.parent.mkdir(exist_ok=True)
        self.runner.submit(
            {
                "job": trial.trial,
                "architecture": trial.candidate.architecture.to_json(),
                "train": dump(trial.candidate.train),
                "task": dump(self.space.task),
                "goals": [goal.model_dump(mode="json", exclude_defaults=True) for goal in self.goals],
                "base_dir": str(self.space.base_dir),
                "corpus_sha256": self.corpus_sha256,
                "device": self.device,
                "repeats": runtime.latency_repeats,
                "until_tokens": 0 if len(self.kinds) > 1 and not trial.timed else self._budget(trial),
                "checkpoint": str(checkpoint),
                "keep": runtime.keep_checkpoints != "none",
                "timed": trial.timed,
                **({} if trial.kind is None else {"kind": trial.kind}),
            }
        )

    def _budget(self, trial: Trial) -> int:
        tokens = trial.candidate.train.tokens
        return tokens if trial.number is None else round(self.space.search.rungs[trial.rung] * tokens)

    # ---- results ----------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        if event.kind == "note":
            self.listener.note(event.message or "")
            return
        trial = self.active.get(event.job)
        if trial is None:
            return
        if event.kind == "progress":
            trial.progress = dict(event.data)
            self.listener.running(self, trial, event.data)
            return
        del self.active[event.job]
        if event.kind == "lost":
            if self._may_try_again(trial, event.reason):
                self.listener.note(f"trial {trial.trial}: {event.message}; it goes on elsewhere")
                self.waiting.insert(0, trial)
            else:
                self._fail(trial, event.reason or "crash", event.message or "")
            return
        if event.data["status"] == "unwritable":  # others may have ended meanwhile: they are recorded before it stops
            self.unwritable = f"trial {trial.trial} cannot be run: {event.data['message']}"
            return
        outcome = _finite(event.data)
        trial.readings.update(outcome["objectives"])
        trial.timed = outcome["status"] != "measured"
        for what, seconds in outcome["seconds"].items():
            trial.seconds[what] = trial.seconds.get(what, 0.0) + seconds
        if outcome["status"] == "infeasible":
            self._fail(trial, outcome["reason"], outcome["message"], outcome)
        elif outcome["status"] == "measured":
            assert trial.kind is not None
            trial.measured.add(trial.kind)
            trial.timed = len(trial.measured) == len(self.kinds)
            trial.visits += 1
            self.waiting.insert(0, trial)
        elif outcome["status"] == "paused":
            self._pause(trial, outcome)
        else:
            self._complete(trial, outcome)

    def _may_try_again(self, trial: Trial, reason: str | None) -> bool:
        """A worker's death may be chance, a node's loss is not the trial's fault; a hang is not worth another wait."""
        if reason == "node_lost":
            trial.moves += 1
            return trial.moves <= MAX_MOVES
        return (
            reason in ("crash", "out_of_memory")
            and trial.attempts - trial.moves - trial.visits < self.space.runtime.tries
        )

    def _complete(self, trial: Trial, outcome: Mapping[str, Any]) -> None:
        self._record(trial, "complete", outcome=outcome)
        if trial.number is not None:
            values = [trial.readings[axis]["value"] for axis in self.axes]
            self.untold.append(partial(self.journal.tell, trial.number, values))
        if (now := time.monotonic()) >= self.prune_at:  # its cost grows with the study: a twentieth of the time at most
            self._prune()
            self.prune_at = now + 20 * (time.monotonic() - now)

    def _pause(self, trial: Trial, outcome: Mapping[str, Any]) -> None:
        self.folder.append_rung(
            {
                "trial": trial.trial,
                "rung": trial.rung,
                "tokens": outcome["tokens"],
                "readings": trial.readings,
                "seconds": trial.seconds,
            }
        )
        self.rungs.report(trial.trial, trial.rung, self._minimised(trial.readings))
        self.paused[trial.trial] = trial

    def _fail(self, trial: Trial, reason: str, message: str, outcome: Mapping[str, Any] | None = None) -> None:
        self._record(trial, "infeasible", reason=reason, message=message, outcome=outcome)
        if trial.number is not None:
            self.untold.append(partial(self.journal.tell_infeasible, trial.number))

    def _copy(self, trial: Trial, twin: int) -> None:
        """The same graph trained the same way: the twin's result, or nothing while it is still on its way."""
        record = self.records.get(twin)
        self._record(trial, "duplicate", copy_of=twin, with_architecture=False)
        assert trial.number is not None
        if record is not None and record.status == "complete":
            self.journal.tell(trial.number, [record.objectives[axis].value for axis in self.axes])
        else:
            self.journal.tell_failed(trial.number)

    def _stop_paused(self) -> None:
        """The study is over: what waits at a rung stays there."""
        for trial in list(self.paused.values()):
            del self.paused[trial.trial]
            self._record(
                trial, "stopped", message=f"stopped at rung {trial.rung + 1} of {len(self.space.search.rungs)}"
            )
            if trial.number is not None:
                self.untold.append(partial(self.journal.tell_stopped, trial.number))
        self._settle()
        self._prune()

    def _prune(self) -> None:
        prune_checkpoints(self.folder, list(self.records.values()), self._axes(), self.space.runtime, self._busy())

    def _record(self, trial: Trial, status: str, **rest: Any) -> None:
        """Keep how a trial ended; `rest` as `make_record` takes it."""
        record = make_record(trial, status, self.folder, **rest)
        self.folder.append(record, sync=False)
        self.records[record.trial] = record
        self.going.discard(record.trial)
        self.n_recorded += _counts(record)
        self.listener.recorded(self, record)

    # ---- small things -----------------------------------------------------------------------------------------

    def _new_id(self) -> int:
        self.last_id += 1
        return self.last_id

    def _busy(self) -> set[int]:
        return {*self.active, *self.paused, *(trial.trial for trial in self.waiting)}

    def _axes(self) -> dict[str, Literal["min", "max"]]:
        return dict(zip(self.axes, self.directions, strict=True))

    def _minimised(self, readings: Mapping[str, Any]) -> list[float]:
        return [
            readings[axis]["value"] * (1 if goal == "min" else -1)
            for axis, goal in zip(self.axes, self.directions, strict=True)
        ]


def _counts(record: TrialRecord) -> bool:
    """Whether it uses up the budget of candidates."""
    return record.name is None and was_run(record)


def _finite(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """The outcome; where an objective is NaN or infinite, a failure that says so."""
    readings = outcome["objectives"]
    bad = {axis: reading for axis, reading in readings.items() if not math.isfinite(reading["value"])}
    if not bad:
        return outcome
    axis, reading = next(iter(bad.items()))
    rest = {name: found for name, found in readings.items() if name not in bad}
    failed = {"status": "infeasible", "reason": "non_finite", "message": f"{axis} is {reading['value']}"}
    return {**outcome, "objectives": rest, **(failed if outcome["status"] != "infeasible" else {})}
