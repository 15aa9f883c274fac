"""Our samplers suggest what Optuna's own do, to the last parameter, and read the journal no more than they must."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from spaces import TINY
from study_tools import FakeRunner, outcome, run_study

from archsearch.runners import Event
from archsearch.settings import Search
from archsearch.space import SearchSpace
from archsearch.study import changes
from archsearch.study.journal import Journal, make_sampler

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
