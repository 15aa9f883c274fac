"""Our samplers suggest what Optuna's own do, to the last parameter, and read the journal no more than they must."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.study._multi_objective import _fast_non_domination_rank
from spaces import TINY
from study_tools import FakeRunner, outcome, run_study

from archsearch.runners import Event
from archsearch.settings import Search
from archsearch.space import SearchSpace
from archsearch.study import changes, tpe
from archsearch.study.journal import Journal, make_sampler
from archsearch.study.parzen import Density

# conditional holes, numbers beside categories, and a rule that refuses a good part of the candidates
SPACE = (
    TINY.replace("n_blocks: 4", "n_blocks: 5")
    .replace(
        "{ratio: {swa: {choice: [1, 3]}, full: 1}",
        "{choice: [{each: [swa, full]}, {ratio: {swa: {range: [1, 4]}, full: 1}",
    )
    .replace("place: {full: {choice: [even, first]}}}", "place: {full: {choice: [even, first]}}}]}")
    .replace("lr: 3e-3", "lr: {log_range: [1e-3, 1e-1]}, beta1: {range: [0.8, 0.95, 0.05]}")
    .replace("trials: 4", "trials: 48, sampler: SAMPLER, rungs: [1/2, 1]")
    + "rules: [count(full) >= 2]\n"
)


def flaky(job: Mapping[str, Any]) -> Event | None:
    """Every seventh trial fails."""
    found = outcome(job)
    failed = {**found, "status": "infeasible", "reason": "exception", "message": "failed", "objectives": {}}
    return Event(job["job"], "done", failed if job["job"] % 7 == 3 else found)


def journal_of(sampler: str, folder: Path) -> list[dict[str, Any]]:
    """What a study says to Optuna, times left out; it is cut in two, as by a kill."""
    space = SearchSpace.from_text(SPACE.replace("SAMPLER", sampler))
    for trials in (30, 48):
        run_study(space, folder, FakeRunner(slots=6, fault=flaky), n_trials=trials)
    lines = [json.loads(line) for line in (folder / "study.journal").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("datetime", "worker"))} for line in lines]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3"])
def test_the_suggestions_are_the_originals(sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = journal_of(sampler, tmp_path / "ours")
    monkeypatch.setattr(changes, "TESTED", ())
    assert type(make_sampler(Search(sampler=sampler), 0)).__module__.startswith("optuna.")
    original = journal_of(sampler, tmp_path / "original")
    assert len(ours) > 300
    assert ours == original


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_one_objective_too(sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def suggested(name: str) -> list[dict[str, Any]]:
        journal = Journal(tmp_path / name, ["max"], Search(sampler=sampler, trials=60))  # type: ignore[arg-type]
        for trial in range(60):
            number, chooser = journal.ask(trial)
            at = chooser.real("x", -1.0, 1.0, None, False) + chooser.choice("y", ["a", "b", "c"])
            if trial % 5 == 4:
                journal.tell_stopped(number)
            else:
                journal.tell(number, [round(-(at**2), 1)])
        return [trial.params for trial in journal.study.get_trials(deepcopy=False)]

    ours = suggested("ours")
    monkeypatch.setattr(changes, "TESTED", ())
    assert ours == suggested("original")


NUMBERS = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "beta": FloatDistribution(0.8, 0.95, step=0.05),
    "n": IntDistribution(1, 9),
    "width": IntDistribution(1, 512, log=True),
    "drop": FloatDistribution(0.0, 0.5),
    "noise": FloatDistribution(-1.0, 1.0),
}
CHOICES = {"kind": CategoricalDistribution(range(3)), "layout": CategoricalDistribution(range(12))}
GROUPS = [["kind"], ["kind", "layout"], ["lr"], ["lr", "layout"], ["n", "kind"], [*NUMBERS, *CHOICES]]


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 150, 2100])
def test_densities_are_the_originals(names: list[str], n: int) -> None:
    space = {name: (NUMBERS | CHOICES)[name] for name in names}
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=n))
    asked = [drawn.ask(space) for _ in range(100)]
    known = {k: [float(d.to_internal_repr(t.params[k])) for t in asked] for k, d in space.items()}
    seen = {name: np.resize(np.array(values), n) for name, values in known.items()}
    options = optuna.samplers.TPESampler()._parzen_estimator_parameters
    for weights in (None, np.ones(n)):
        theirs, ours = _ParzenEstimator(seen, space, options, weights), Density(seen, space, options, weights)
        streams = [np.random.RandomState(3) for _ in range(2)]
        points, same = theirs.sample(streams[0], 24), ours.sample(streams[1], 24)
        assert {k: v.tolist() for k, v in points.items()} == {k: same[k].tolist() for k in points}
        assert streams[0].random_sample() == streams[1].random_sample()
        assert theirs.log_pdf(points).tolist() == ours.log_pdf(points).tolist()
        few, chosen = ours.distinct(points), (lambda log_pdf, at: {k: v[np.argmax(log_pdf(at))] for k, v in at.items()})
        assert chosen(ours.log_pdf, few) == chosen(theirs.log_pdf, points)


@pytest.mark.parametrize("n", [1, 2, 30, 200])
def test_ranks_are_the_originals_as_far_as_they_count(n: int) -> None:
    random = np.random.RandomState(n)
    for losses in (random.rand(n, 2), random.randint(0, 6, (n, 2)).astype(float), np.ones((n, 2))):
        for below in {1, max(1, n // 10), n}:
            theirs, ours = _fast_non_domination_rank(losses, n_below=below), tpe._ranks(losses, below)
            assert theirs.tolist() == ours.tolist()


@pytest.mark.parametrize("n_losses", [1, 2, 3])
def test_the_best_are_kept_while_nothing_changes_them(n_losses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fresh = tpe._best
    monkeypatch.setattr(tpe, "_best", lambda losses, n: calls.append(n) or fresh(losses, n))
    random, best = np.random.RandomState(n_losses), tpe._Best()
    ended: list[int] = []
    losses = np.round(random.rand(400, n_losses), 1)
    for number in random.permutation(400):  # trials end in another order than they began
        ended = sorted([*ended, int(number)])
        numbers, n = np.array(ended), len(ended) // 10
        found = best.of(numbers, losses[numbers], n)
        assert found.tolist() == numbers[fresh(losses[numbers], n)[0]].tolist()
    assert len(calls) == 400 if n_losses == 1 else len(calls) < 250


def test_the_installed_optuna_is_one_that_was_tested() -> None:
    assert changes.is_tested(), f"look at archsearch/study/tpe.py and genetic.py with Optuna {optuna.__version__}"


def test_what_was_written_is_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal", ["min"], Search(sampler="random"))
    monkeypatch.setattr("builtins.open", None)  # how Optuna reads its file
    for trial in range(3):
        number, chooser = journal.ask(trial)
        chooser.choice("x", ["a", "b"])
        journal.tell(number, [float(trial)])
    monkeypatch.undo()
    again = Journal(tmp_path / "journal", ["min"], Search(sampler="random"))
    assert [t.values for t in again.study.get_trials()] == [[0.0], [1.0], [2.0]]
    assert [t.params for t in again.study.get_trials()] == [t.params for t in journal.study.get_trials()]
    assert again.worst == journal.worst == [2.0]
