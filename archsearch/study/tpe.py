"""Optuna's TPE with the same suggestions and less work per ask: a trial is read once, not at every ask.

Optuna's sampler reads every trial of the study anew for each group of parameters of each ask. Here a finished trial's
parameters, values and feasibility become rows of arrays when it ends; the split into good and bad is made once per ask;
the densities (`archsearch.study.parzen`) and the random stream are Optuna's own, to the last bit. A test holds the
suggestions equal to the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe.sampler import (
    _get_reference_point,
    _solve_hssp_with_cache,
    default_gamma,
    default_gamma_multiobjective,
)
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace, _SearchSpaceGroup
from optuna.study._multi_objective import _fast_non_domination_rank
from optuna.trial import FrozenTrial, TrialState

from archsearch.study.changes import Changes
from archsearch.study.parzen import Density, Floats, Numbers

COMPLETE, PRUNED, RUNNING = int(TrialState.COMPLETE), int(TrialState.PRUNED), int(TrialState.RUNNING)
Params = dict[str, Any]


class TPESampler(optuna.samplers.TPESampler):
    """For one study in a journal, whose trials are asked and told by this process, one at a time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._history = _History()
        self._group_decomposed_search_space = _Groups(self._history)
        self._is_started = False
        self._split: tuple[int, Numbers, Numbers] | None = None  # of which trial's ask; good and bad trials
        self._belows: dict[tuple[str, ...], tuple[Numbers, Density]] = {}  # by the names of a group; the good trials

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """A result changes the split."""
        self._split = None
        super().after_trial(study, trial, state, values)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that no finished trial has, or any before the model starts."""
        if not self._may_start(study):
            return super().sample_independent(study, trial, param_name, param_distribution)
        return self._sample(study, trial, {param_name: param_distribution})[param_name]

    def _sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sample(study, trial, search_space) if search_space and self._may_start(study) else {}

    def _may_start(self, study: optuna.Study) -> bool:
        if not self._is_started:
            ended = (TrialState.COMPLETE, TrialState.PRUNED)
            trials = study._get_trials(deepcopy=False, states=ended, use_cache=True)
            self._is_started = len(trials) >= self._n_startup_trials
        return self._is_started

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._split is None or self._split[0] != trial.number:
            self._history.read(study)
            self._split = (trial.number, *self._history.split(study, trial.number))
        _, good, bad = self._split
        table = self._history.table(search_space, lambda one: self._get_params(one, study))
        below = self._below(study, table, good, search_space)
        above = Density(table.observations(bad), search_space, self._parzen_estimator_parameters)
        samples = below.distinct(below.sample(self._rng.rng, self._n_ei_candidates))
        found = self._compare(samples, below.log_pdf(samples) - above.log_pdf(samples))
        return {name: space.to_external_repr(found[name]) for name, space in search_space.items()}

    def _below(
        self, study: optuna.Study, table: _Table, good: Numbers, search_space: dict[str, BaseDistribution]
    ) -> Density:
        """The density of the good trials, which most asks find as the one before left it."""
        names = tuple(search_space)
        known = self._belows.get(names)
        if known is None or not np.array_equal(known[0], good):
            seen = table.observations(good)
            even = np.ones(len(next(iter(seen.values())))) if study._is_multi_objective() else None
            known = good, Density(seen, search_space, self._parzen_estimator_parameters, even)
            self._belows[names] = known
        return known[1]


class _History:
    """Every trial of the study by its number: what state it is in, its losses, how far it breaks its constraints."""

    def __init__(self) -> None:
        self.watch = Changes()
        self.changes: list[int] = []  # numbers of trials that came or changed, as often as they did
        self.kind = np.empty(0, dtype=np.int8)
        self.score = np.empty(0)
        self.losses = np.empty((0, 0))
        self.best = _Best()
        self.good: Numbers | None = None  # unknown after a result
        self.tables: dict[tuple[str, ...], _Table] = {}

    def read(self, study: optuna.Study) -> None:
        """Take in what has changed."""
        changed = self.watch.read(study)
        self._make_room(len(self.trials))
        for number in changed:
            self._take(number, self.trials[number])
        self.changes += changed

    @property
    def trials(self) -> list[FrozenTrial]:
        """All of them."""
        return self.watch.trials

    def _take(self, number: int, trial: FrozenTrial) -> None:
        self.kind[number] = trial.state
        if trial.state.is_finished():
            self.good = None
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            self.score[number] = sum(violation for violation in trial.constraints.values() if violation > 0)
        if trial.state == TrialState.COMPLETE:
            if self.losses.shape[1] != len(trial.values):
                self.losses = np.empty((len(self.kind), len(trial.values)))
            self.losses[number] = trial.values

    def split(self, study: optuna.Study, asked: int) -> tuple[Numbers, Numbers]:
        """Good and bad trials, divided as Optuna's `_split_trials` does (2105.01573, 2009.09324).

        asked: the trial that is being sampled, which is neither.
        """
        kind = self.kind[: len(self.trials)]
        if self.good is None:
            self.good = self._good(study, kind)
        is_bad = (kind == COMPLETE) | (kind == PRUNED) | (kind == RUNNING)
        is_bad[self.good] = is_bad[asked] = False
        return self.good, np.flatnonzero(is_bad)

    def _good(self, study: optuna.Study, kind: NDArray[np.int8]) -> Numbers:
        score = self.score[: len(kind)]
        ended = (kind == COMPLETE) | (kind == PRUNED)
        gamma = default_gamma_multiobjective if len(study.directions) > 1 else default_gamma
        n_good = int(gamma(int(ended.sum())))
        signs = [-1.0 if d == optuna.study.StudyDirection.MAXIMIZE else 1.0 for d in study.directions]
        complete = np.flatnonzero((kind == COMPLETE) & (score <= 0))
        pruned = np.flatnonzero((kind == PRUNED) & (score <= 0))
        broken = np.flatnonzero(ended & (score > 0))
        good = self.best.of(complete, self.losses[complete] * signs, n_good)
        for worse in (pruned, broken[np.argsort(score[broken], kind="stable")]):
            good = np.append(good, worse[: max(0, n_good - len(good))])
        return np.sort(good)

    def table(self, search_space: dict[str, BaseDistribution], params: Callable[[FrozenTrial], Params]) -> _Table:
        """The parameters of a group, for all trials; `params` gives those of one."""
        table = self.tables.setdefault(tuple(search_space), _Table(search_space))
        table.make_room(len(self.kind))
        for number in dict.fromkeys(self.changes[table.n_changes :]):
            table.write(number, params(self.trials[number]))
        table.n_changes = len(self.changes)
        return table

    def _make_room(self, n: int) -> None:
        more = max(n, 2 * len(self.kind)) - len(self.kind) if n > len(self.kind) else 0
        if more:
            self.kind = np.append(self.kind, np.zeros(more, dtype=np.int8))
            self.score = np.append(self.score, np.zeros(more))
            self.losses = np.append(self.losses, np.zeros((more, self.losses.shape[1])), axis=0)


class _Table:
    """One row per trial: a group's parameters as the estimators take them."""

    def __init__(self, search_space: dict[str, BaseDistribution]) -> None:
        self.search_space = search_space
        self.rows = np.empty((0, len(search_space)))
        self.is_whole = np.empty(0, dtype=bool)  # whether the trial has all of them
        self.n_changes = 0  # so many of the history's were taken in

    def make_room(self, n: int) -> None:
        """Rows for n trials."""
        if (more := n - len(self.rows)) > 0:
            self.rows = np.append(self.rows, np.zeros((more, self.rows.shape[1])), axis=0)
            self.is_whole = np.append(self.is_whole, np.zeros(more, dtype=bool))

    def write(self, number: int, params: Params) -> None:
        """The row of a trial."""
        self.is_whole[number] = self.search_space.keys() <= params.keys()
        if self.is_whole[number]:
            self.rows[number] = [space.to_internal_repr(params[name]) for name, space in self.search_space.items()]

    def observations(self, numbers: Numbers) -> dict[str, Floats]:
        """The parameters of those trials that have them all."""
        rows = self.rows[numbers[self.is_whole[numbers]]]
        return {name: rows[:, i] for i, name in enumerate(self.search_space)}


class _Groups(_GroupDecomposedSearchSpace):
    """Names that always occur together. Optuna adds every trial at every ask; one seen before changes nothing."""

    def __init__(self, history: _History) -> None:
        super().__init__(include_pruned=True)
        self.history, self.n_changes = history, 0

    def calculate(self, study: optuna.Study, use_cache: bool = False) -> _SearchSpaceGroup:
        """The groups so far."""
        history = self.history
        history.read(study)
        for number in history.changes[self.n_changes :]:
            trial = history.trials[number]
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                self._search_space.add_distributions(trial.distributions)
        self.n_changes = len(history.changes)
        found = _SearchSpaceGroup()
        found._search_spaces = [dict(space) for space in self._search_space.search_spaces]
        return found


class _Best:
    """The best trials by rank, then by hypervolume, or by a single loss. Most results change nothing of that."""

    def __init__(self) -> None:
        self.n = -1
        self.is_known = np.zeros(0, dtype=bool)  # by a trial's number
        self.good = np.empty(0, dtype=np.intp)
        self.edge: Floats | None = None  # losses of the last rank of which some are among the best

    def of(self, numbers: Numbers, losses: Floats, n: int) -> Numbers:
        """The n best of these trials, losses [trials, losses]; every trial comes back in the next call."""
        n = min(n, len(losses))
        if (more := 1 + numbers.max(initial=-1) - len(self.is_known)) > 0:
            self.is_known = np.append(self.is_known, np.zeros(more + len(self.is_known), dtype=bool))
        if n != self.n or not self._are_beaten(losses[~self.is_known[numbers]]):
            self.n = n
            at, self.edge = _best(losses, n)
            self.good = numbers[at]
        self.is_known[numbers] = True
        return self.good

    def _are_beaten(self, losses: Floats) -> bool:
        """Whether each is dominated by a trial of the edge: then its rank is worse, and it changes no other's."""
        if self.edge is None:
            return False
        no_worse, better = (self.edge <= losses[:, None]).all(axis=2), (self.edge < losses[:, None]).any(axis=2)
        return bool(np.logical_and(no_worse, better).any(axis=1).all())


def _best(losses: Floats, n: int) -> tuple[Numbers, Floats | None]:
    """Positions of the n best rows, and the rows of the last rank among them, where that says what can change them."""
    if n == 0 or n == len(losses):
        return np.arange(n), None
    if losses.shape[1] == 1:
        return np.argsort(losses[:, 0], kind="stable")[:n], None
    ranks = _ranks(losses, n) if losses.shape[1] == 2 else _fast_non_domination_rank(losses, n_below=n)
    levels, counts = np.unique(ranks, return_counts=True)
    last = int(np.max(levels[np.cumsum(counts) <= n], initial=-1))
    at = np.arange(len(losses))
    whole = at[ranks <= last]
    if len(whole) == n:
        return whole.astype(np.intp), losses[ranks == last]
    edge = losses[ranks == last + 1]
    rest = _solve_hssp_with_cache(
        tuple(edge.ravel()), tuple(at[ranks == last + 1]), n - len(whole), tuple(_get_reference_point(edge))
    )
    return np.append(whole, rest).astype(np.intp), edge


def _ranks(losses: Floats, n: int) -> Numbers:
    """Non-domination ranks of two losses, right for the n best; the rest share the next rank.

    In the order of the first loss, the front is where the second falls below all before.
    """
    order = np.lexsort((losses[:, 1], losses[:, 0]))
    ordered = losses[order]
    is_new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
    left, second = np.flatnonzero(is_new), ordered[is_new, 1]
    ranks = np.zeros(len(losses), dtype=np.intp)
    rank, unranked = 0, len(left) - min(n, len(left))
    while len(left) > unranked:
        lowest = np.minimum.accumulate(second)
        is_front = np.append(True, lowest[1:] < lowest[:-1])
        ranks[left[is_front]] = rank
        left, second, rank = left[~is_front], second[~is_front], rank + 1
    ranks[left] = rank
    found = np.empty(len(losses), dtype=np.intp)
    found[order] = ranks[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    return found
