"""A study goes on: what a driver killed at any moment leaves behind, and what is on the disk before what."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from study_tools import RUNGS, SPACE, WIDER, FakeRunner, Fault, by_status, optuna_trials, run_study

from archsearch.runners import Event
from archsearch.space import SearchSpace
from archsearch.store import RunFolder
from archsearch.study import Listener, Study
from archsearch.study.journal import Journal


class Killed(BaseException):
    """Stands for kill -9: nothing gets to clean up."""


def test_an_interrupted_baseline_keeps_its_number_and_so_its_checkpoint(tmp_path: Path) -> None:
    space = SearchSpace.from_text(WIDER.replace("trials: 4", "trials: 1, seeds: 3, baselines: [transformer, gemma3]"))

    class FirstIsSlow(FakeRunner):
        def wait(self, timeout: float) -> list[Event]:
            if any(job["job"] == 2 for job in self.jobs):
                raise Killed  # 0 and 2 have checkpoints, 1 has ended
            slow, self.jobs = self.jobs[:1], self.jobs[1:]
            events = super().wait(timeout)
            self.jobs = slow
            return events

    killed = FirstIsSlow(slots=2)
    with pytest.raises(Killed):
        run_study(space, tmp_path / "run", killed)
    before = {job["job"]: (job["architecture"], job["train"]) for job in killed.jobs}
    assert before.keys() == {0, 2}
    _, runner = run_study(space, tmp_path / "run")
    after = {job["job"]: (job["architecture"], job["train"]) for job in runner.ran}
    assert {number: after[number] for number in before} == before
    assert after.keys() == {0, 2, 3, 4}  # of the four baselines 1 has its record; 4 was sampled


@pytest.mark.parametrize("moment", range(1, 12, 2))
def test_a_killed_driver_loses_nothing(tmp_path: Path, moment: int) -> None:
    def fault(job: Mapping[str, Any]) -> Event | None:
        if len(killer.ran) >= moment:
            raise Killed
        return None

    killer = FakeRunner(fault=fault)
    with pytest.raises(Killed):
        run_study(SPACE, tmp_path / "run", killer)
    before = RunFolder.open(tmp_path / "run").records()
    study, runner = run_study(SPACE, tmp_path / "run")
    after = study.folder.records()
    assert after[: len(before)] == before
    assert len({record.trial for record in after}) == len(after)
    assert sum(record.status == "complete" for record in after) == 12
    interrupted = {job["job"] for job in killer.ran} - {record.trial for record in before}
    assert interrupted <= {job["job"] for job in runner.ran}  # run again under its old number
    assert not [t for t in optuna_trials(study.folder) if t.state == optuna.trial.TrialState.RUNNING]


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_resumed_study_says_what_was_interrupted(tmp_path: Path) -> None:
    text = WIDER.replace("trials: 4", "trials: 3, baselines: [transformer, gemma3]")
    space = SearchSpace.from_text(text)

    def killed_at(trial: int) -> Fault:
        def fault(job: Mapping[str, Any]) -> Event | None:
            if job["job"] >= trial:
                raise Killed
            return None

        return fault

    for run, stop_at, expected in (
        ("a", 0, "trial 0 from its checkpoint, trial 1 from its checkpoint"),
        ("b", 3, "trial 3 from its checkpoint"),
    ):
        with pytest.raises(Killed):
            run_study(space, tmp_path / run, FakeRunner(1 + (run == "a"), killed_at(stop_at), checkpoints=True))
        again = Notes()
        _, runner = run_study(space, tmp_path / run, FakeRunner(checkpoints=True), again)
        assert again.notes == [f"goes on with what was interrupted: {expected}"]
        assert runner.ran
        again = Notes()
        run_study(space, tmp_path / run, listener=again)
        assert not again.notes  # nothing is left
    with pytest.raises(Killed):
        run_study(space, tmp_path / "c", FakeRunner(1, killed_at(3)))
    again = Notes()
    run_study(space, tmp_path / "c", listener=again)
    assert again.notes == ["goes on with what was interrupted: trial 3 from the start"]


def test_a_record_that_was_never_told_is_told_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Journal, number: int, values: list[float]) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "tell", dies)
        with pytest.raises(Killed):
            run_study(SPACE, tmp_path / "run", FakeRunner(slots=1))
    (record,) = RunFolder.open(tmp_path / "run").records()
    study, runner = run_study(SPACE, tmp_path / "run")
    assert record.trial not in {job["job"] for job in runner.ran}
    told = {t.user_attrs["trial"]: t.values for t in optuna_trials(study.folder)}
    assert told[record.trial] == [record.objectives[axis].value for axis in ("val_bpb", "state_bytes")]


def test_a_finished_study_has_nothing_left_to_do(tmp_path: Path) -> None:
    run_study(SPACE, tmp_path / "run")
    _, runner = run_study(SPACE, tmp_path / "run")
    assert not runner.ran
    _, runner = run_study(SPACE, tmp_path / "run", n_trials=14)  # more of the same
    assert len(runner.ran) == 2


@pytest.mark.parametrize("moment", [2, 5, 8, 10])
def test_rungs_survive_a_kill(tmp_path: Path, moment: int) -> None:
    def fault(job: Mapping[str, Any]) -> Event | None:
        if len(killer.ran) >= moment:
            raise Killed
        return None

    space = SearchSpace.from_text(RUNGS)
    killer = FakeRunner(slots=1, fault=fault)
    with pytest.raises(Killed):
        run_study(space, tmp_path / "run", killer)
    study, runner = run_study(space, tmp_path / "run", FakeRunner(slots=1))
    assert by_status(study.folder)["complete"] == 3
    assert by_status(study.folder)["stopped"] == 6
    runs = Counter((job["job"], job["until_tokens"]) for job in killer.ran + runner.ran)
    assert max(runs.values()) == 1  # no rung is trained twice, the interrupted one was never counted as run


def test_a_kill_between_records_and_sampler_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Study._settle

    def killed(study: Study) -> None:
        if study.untold and study.n_recorded >= 5:
            raise InterruptedError
        settle(study)

    monkeypatch.setattr(Study, "_settle", killed)
    first, second = FakeRunner(slots=4), FakeRunner(slots=4)
    with pytest.raises(InterruptedError):
        run_study(SPACE, tmp_path / "run", first)
    folder = RunFolder.open(tmp_path / "run")
    untold = [t for t in optuna_trials(folder) if t.state == optuna.trial.TrialState.RUNNING]
    assert {t.user_attrs["trial"] for t in untold} & {record.trial for record in folder.records()}
    monkeypatch.undo()
    run_study(SPACE, tmp_path / "run", second)
    assert not {job["job"] for job in first.ran} & {job["job"] for job in second.ran}
    assert by_status(folder)["complete"] == 12
    told = {t.user_attrs["trial"]: t.values for t in optuna_trials(folder)}
    for record in folder.records():
        if record.status == "complete":
            assert told[record.trial] == [record.objectives[axis].value for axis in ("val_bpb", "state_bytes")]


def test_results_reach_the_disk_before_the_sampler_and_asks_before_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is waited for once for all that a `wait` brings, and once for all that then start."""
    done: list[str] = []

    def watch(owner: type, name: str) -> None:
        was = getattr(owner, name)

        def noted(self: Any, *given: Any) -> Any:
            done.append(f"{owner.__name__}.{name}")
            return was(self, *given)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in ((RunFolder, "sync"), (Journal, "sync"), (Journal, "tell"), (FakeRunner, "submit")):
        watch(owner, name)
    run_study(SPACE, tmp_path / "run", FakeRunner(slots=4))
    rounds = " ".join(done).split("RunFolder.sync Journal.sync ")[1:]
    assert rounds[0] == "FakeRunner.submit " * 4 + "RunFolder.sync " + "Journal.tell " * 4
    assert sum(part.count("FakeRunner.submit") for part in rounds) == 12
    assert done[-2:] == ["RunFolder.sync", "Journal.sync"]
