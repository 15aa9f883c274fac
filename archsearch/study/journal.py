"""The study's Optuna side: one journal file, one owner, ask and tell.

Settings that Optuna's defaults get wrong for this use are given explicitly: TPE is univariate for several objectives
unless told otherwise, a journal lock left by a killed process would hold up the next start for half a minute, and a
trial that was running when its driver died would stay running for ever.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
import weakref
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from archsearch.errors import RunError
from archsearch.settings import Search
from archsearch.space.holes import Chooser
from archsearch.store import sync_path
from archsearch.study.changes import is_tested

RUNS = "runs"  # the constraint that a trial which ended without a result violates
MANY_TRIALS = 1000  # from here on TPE's asking costs more than it gains


class TrialChooser:
    """Fills holes from an Optuna trial; categories are option numbers, since options may be whole subtrees."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def choice(self, name: str, options: Sequence[Any]) -> int:
        picked = self.trial.suggest_categorical(name, list(range(len(options))))
        assert isinstance(picked, int)
        return picked

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return self.trial.suggest_int(name, low, high, step=step)

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        return self.trial.suggest_float(name, low, high, step=step, log=log)


class _Replay:
    """Fills holes from the parameters of a trial in the journal; raises KeyError if it was never asked so far."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = parameters

    def choice(self, name: str, options: Sequence[Any]) -> int:
        return int(self.parameters[name])

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return int(self.parameters[name])

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        return float(self.parameters[name])


class _Recording:
    """Passes on to another chooser and notes Optuna's parameters and distributions for `Journal.add`."""

    def __init__(self, inner: Chooser) -> None:
        self.inner = inner
        self.parameters: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def choice(self, name: str, options: Sequence[Any]) -> int:
        self.distributions[name] = optuna.distributions.CategoricalDistribution(range(len(options)))
        self.parameters[name] = self.inner.choice(name, options)
        return int(self.parameters[name])

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        self.distributions[name] = optuna.distributions.IntDistribution(low, high, step=step)
        self.parameters[name] = self.inner.integer(name, low, high, step)
        return int(self.parameters[name])

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        self.distributions[name] = optuna.distributions.FloatDistribution(low, high, log=log, step=step)
        self.parameters[name] = self.inner.real(name, low, high, step, log)
        return float(self.parameters[name])


@dataclass(frozen=True)
class Open:
    """A trial that was running when its driver ended: its Optuna number, our number, and how to sample it again.

    again: it was complete once, so no rung may stop it now.
    """

    number: int
    trial: int
    chooser: Chooser
    again: bool


class Journal:
    """Asks for candidates and tells their results. The caller holds the run folder's lock, so nobody else writes."""

    def __init__(self, path: Path, directions: Sequence[str], search: Search, rules: Sequence[str] = ()) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.file = _Backend(path)
        self.storage = _Storage(self.file)
        self.study = optuna.create_study(
            storage=self.storage,
            study_name="archsearch",
            directions=["minimize" if direction == "min" else "maximize" for direction in directions],
            load_if_exists=True,
        )
        self.study.sampler = make_sampler(search, n_before=len(self.study.get_trials(deepcopy=False)))
        self.holds = {**dict.fromkeys(rules, 0.0), RUNS: 0.0}  # samplers want the same constraints of every trial
        self.worst: list[float] | None = None  # values seen so far, each axis for itself
        for done in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            self._remember(done.values)

    def ask(self, trial: int) -> tuple[int, Chooser]:
        """A new trial: its Optuna number and the chooser that samples it. `trial` is our number, kept beside it."""
        asked = self.study.ask()
        asked.set_user_attr("trial", trial)
        return asked.number, TrialChooser(asked)

    def sync(self) -> None:
        """Everything said so far is on the disk when this returns."""
        self.file.sync()

    def tell(self, number: int, values: Sequence[float]) -> None:
        """A result; values in the order of the directions."""
        self._constrain(number, self.holds)
        self._end(number, TrialState.COMPLETE, [float(value) for value in values])
        self._remember(values)

    def tell_infeasible(self, number: int, violations: Mapping[str, float] | None = None) -> None:
        """No result: by rules (`violations`, 0 where one holds) or by failing. The sampler learns to stay away.

        Optuna learns constraints from trials with values only; the worst values so far stand in for the missing ones.
        """
        self._constrain(number, {**self.holds, **(violations or {RUNS: 1.0})})
        self._end(number, TrialState.FAIL if self.worst is None else TrialState.COMPLETE, self.worst)

    def tell_stopped(self, number: int) -> None:
        """The trial stopped at a lower rung."""
        self._end(number, TrialState.PRUNED)

    def tell_failed(self, number: int) -> None:
        """The trial is void: nothing to learn from it."""
        self._end(number, TrialState.FAIL)

    def open_trials(self) -> list[Open]:
        """Trials that were asked and never told."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [
            Open(t.number, t.user_attrs["trial"], _Replay(t.params), "again" in t.user_attrs)
            for t in running
            if "trial" in t.user_attrs
        ]

    def drop_unasked(self) -> None:
        """Close trials that died between ask and their first attribute."""
        for t in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "trial" not in t.user_attrs:
                self.tell_failed(t.number)

    def highest_trial(self) -> int:
        """The highest of our trial numbers in the journal, -1 if there is none."""
        return max((t.user_attrs.get("trial", -1) for t in self.study.get_trials(deepcopy=False)), default=-1)

    @property
    def first(self) -> int:
        """The lowest of our trial numbers that this journal may give out; those below were given before it began."""
        return int(self.study.user_attrs.get("first", 0))

    def begin_at(self, first: int) -> None:
        """Set `first`, for good."""
        self.study.set_user_attr("first", first)

    @contextmanager
    def add(self, trial: int, inner: Chooser, values: Sequence[float] | None) -> Iterator[Chooser]:
        """Sample with the chooser it yields, then a finished trial with those parameters enters the journal.

        values: None for a trial that is to run again.
        """
        recording = _Recording(inner)
        yield recording
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING if values is None else TrialState.COMPLETE,
                params=recording.parameters,
                distributions=recording.distributions,
                values=values,
                user_attrs={"trial": trial, **({"again": True} if values is None else {})},
                constraints=None if values is None else self.holds,
            )
        )
        if values is not None:
            self._remember(values)

    def _id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)

    def _end(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """What `Study.tell` does, which besides returns a deep copy of the trial. Values are finite, one per axis."""
        trial = self.storage.get_trial(self._id(number))
        assert trial.state == TrialState.RUNNING
        self.study.sampler.after_trial(self.study, trial, state, values)
        self.storage.set_trial_state_values(trial._trial_id, state, values)

    def _constrain(self, number: int, violations: Mapping[str, float]) -> None:
        trial = Trial(self.study, self._id(number))
        for name, violation in violations.items():
            if name not in trial.constraints:  # a kill between here and `tell` leaves them set
                trial.set_constraint(name, violation)

    def _remember(self, values: Sequence[float]) -> None:
        if self.worst is None:
            self.worst = [float(value) for value in values]
            return
        picks = [max if d == optuna.study.StudyDirection.MINIMIZE else min for d in self.study.directions]
        self.worst = [float(pick(pair)) for pick, pair in zip(picks, zip(self.worst, values, strict=True), strict=True)]


def make_sampler(search: Search, n_before: int) -> BaseSampler:
    """The sampler a space asks for. Its random stream goes on from how many trials there were, not from the start.

    Raises RunError if the sampler's package is missing.
    """
    seed = search.seed + n_before
    startup = max(4, min(10, search.trials // 3))
    population = max(8, min(50, search.trials // 4))
    name = search.sampler
    if name == "auto":
        name = "nsga2" if search.trials >= MANY_TRIALS else "tpe"
    with warnings.catch_warnings():  # what hybrids need of TPE, and all of NSGA-III, is experimental by name
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match name:
            case "tpe":
                made = _class_of("TPESampler")
                return made(multivariate=True, group=True, constant_liar=True, n_startup_trials=startup, seed=seed)
            case "nsga2":
                return _class_of("NSGAIISampler")(population_size=population, seed=seed)
            case "nsga3":
                return _class_of("NSGAIIISampler")(population_size=population, seed=seed)
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
    assert name == "gp"
    if importlib.util.find_spec("scipy") is None:
        raise RunError("search.sampler gp needs scipy: pip install 'archsearch[gp]'")
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)


def _class_of(name: str) -> Callable[..., BaseSampler]:
    """Our equal of one of Optuna's samplers, or that one where the inside of Optuna is not as expected."""
    if not is_tested():
        return cast("Callable[..., BaseSampler]", getattr(optuna.samplers, name))
    from archsearch.study import genetic, tpe

    return cast("Callable[..., BaseSampler]", getattr(tpe if name == "TPESampler" else genetic, name))


class _Storage(JournalStorage):
    """Optuna's for one study, without the search for enqueued trials at every ask: nobody enqueues here."""

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if states == (TrialState.WAITING,):
            return []
        if states is None and not deepcopy and is_tested():
            return list(self._replay_result._trials.values())
        return super().get_all_trials(study_id, deepcopy, states)


class _Backend(JournalFileBackend):
    """Optuna's file, written by one process that knows what it wrote, and synced when a trial is about to run.

    A kill loses nothing: what was written is the kernel's. After a power cut the asks that nobody had run yet may be
    gone, results may have to be told again from their records, and half a line may be left, which is cut off here.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            whole, _, torn = path.read_bytes().rpartition(b"\n")
            if torn:
                os.truncate(path, len(whole) + 1 if whole else 0)
        super().__init__(str(path), lock_obj=_NoLock(str(path)))
        self.path, self.is_dirty = path, False
        self.out: int | None = None  # the file, open for good: opening it takes longer than writing a line
        self.n_read: int | None = None  # logs that `read_logs` has handed out; None: the file was not read yet
        self.fresh: list[str] = []  # lines written since

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Lines as JournalFileBackend writes them."""
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        if self.out is None:
            self.out = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self.out)
        data = "".join(line + "\n" for line in lines).encode()
        while data:  # a disk that runs full takes a part, then raises
            data = data[os.write(self.out, data) :]
        self.fresh += lines
        self.is_dirty = True

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Logs from a number on: the file once, then what was written since. Optuna asks after every write."""
        if self.n_read is None or log_number_from < self.n_read:
            logs = list(super().read_logs(log_number_from))
            self.n_read, self.fresh = log_number_from + len(logs), []
            yield from logs
            return
        assert log_number_from == self.n_read
        lines, self.fresh = self.fresh, []
        self.n_read += len(lines)
        yield from map(json.loads, lines)

    def sync(self) -> None:
        """Wait for the disk, if there is anything to wait for."""
        if self.is_dirty:
            sync_path(self.path)
            self.is_dirty = False


class _NoLock(JournalFileOpenLock):
    """The run folder's own lock already makes this process the journal's only user."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return
