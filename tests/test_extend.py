"""`--extend`: what stays, what runs again, which numbers are given, and kills on the way."""

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from spaces import TINY
from study_tools import FakeRunner, die_at, open_folder, outcome, run_study

from archsearch.errors import RunError
from archsearch.extend import Extended, extend
from archsearch.launch import settings_of
from archsearch.report import build_front
from archsearch.runners import Event
from archsearch.settings import Search
from archsearch.space import SearchSpace
from archsearch.store import RunFolder, TrialRecord
from archsearch.study.journal import Journal

EACH = TINY.replace(
    "{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}", "{each: [swa, full]}"
).replace("lr: 3e-3", "lr: {choice: [1e-3, 3e-3, 1e-2]}")
TEXT = EACH.replace("trials: 4", "trials: 12")
FEWER_RATES = TEXT.replace("[1e-3, 3e-3, 1e-2]", "[1e-3, 3e-3]")
WIDER = EACH.replace("d_model: 32", "d_model: 128").replace("d_model: 64", "d_model: 256")


class Killed(BaseException):
    """Stands for kill -9: nothing gets to clean up."""


def change(text: str, path: Path) -> tuple[SearchSpace, Extended]:
    space = SearchSpace.from_text(text)
    folder = open_folder(space, path)
    with folder.lock():
        return space, extend(space, folder, settings_of(space))


def left_the_space(path: Path) -> list[TrialRecord]:
    lines = (path / "trials.outside.jsonl").read_text().splitlines()
    return [TrialRecord.model_validate_json(line) for line in lines]


def in_the_journal(path: Path) -> set[int]:
    trials = Journal(path / "study.journal", ["min", "min"], Search()).study.get_trials(deepcopy=False)
    return {t.user_attrs["trial"] for t in trials if t.state != optuna.trial.TrialState.RUNNING}


def checkpoints_of(path: Path) -> set[int]:
    return {int(file.stem) for file in (path / "checkpoints").glob("*.safetensors")}


def best_at(rate: str) -> Any:
    """Quality by the learning rate, so that a narrower space has another front; lower is better."""

    def fault(job: Mapping[str, Any]) -> Event | None:
        made = outcome(job)
        made["objectives"]["val_bpb"]["value"] += 0.0 if f"{job['train'].get('lr')}" == rate else 5.0
        return Event(job["job"], "done", made)

    return fault


def test_what_is_still_inside_stays_and_no_number_is_given_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    study, _ = run_study(SearchSpace.from_text(TEXT), run, FakeRunner(checkpoints=True))
    before = {record.trial: record for record in study.folder.records() if record.status == "complete"}
    given = {record.trial for record in study.folder.records()}
    changed, found = change(FEWER_RATES, run)
    inside = {n for n, record in before.items() if record.train.get("lr") != 0.01}
    records = {record.trial for record in RunFolder.open(run).records() if record.status == "complete"}
    assert records == inside - set(found.again)
    assert found.outside == len(before) - len(inside) > 0
    assert found.stay == len(records)
    assert {record.trial for record in left_the_space(run)} >= set(before) - records
    study, runner = run_study(changed, run, FakeRunner(checkpoints=True))  # which refuses a stranger's checkpoint
    assert len(runner.ran) == 12 - len(records)
    assert {job["job"] for job in runner.ran} & given == set(found.again)
    assert in_the_journal(run) >= inside


def test_an_interrupted_trial_and_a_new_baseline_get_no_old_number(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def fault(job: Mapping[str, Any]) -> Event | None:
        if job["job"] >= 3:
            raise Killed  # its checkpoint stays, and there is no record of it
        return None

    first = FakeRunner(fault=fault, checkpoints=True)
    wide = WIDER.replace("trials: 4", "trials: 6")
    with pytest.raises(Killed):
        run_study(SearchSpace.from_text(wide), run, first)
    old = {record.trial for record in RunFolder(run).records()} | checkpoints_of(run)
    assert max(old) >= 3
    with_baselines = wide.replace("[1e-3, 3e-3, 1e-2]", "[5e-3]").replace(
        "trials: 6", "trials: 6, baselines: [transformer, gemma3], seeds: 2"
    )
    changed, found = change(with_baselines, run)
    assert (found.stay, found.again) == (0, ())
    _, runner = run_study(changed, run, FakeRunner(checkpoints=True))
    assert {job["job"] for job in runner.ran}.isdisjoint(old)
    assert checkpoints_of(run).isdisjoint(old)  # what nobody needs is deleted as the study goes on
    names = [record.name for record in RunFolder.open(run).records() if record.name]
    assert sorted(names) == ["gemma3", "transformer", "transformer, seed 1"]


def test_baselines_that_a_kill_interrupts_after_extending_keep_their_numbers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    wide = WIDER.replace("trials: 4", "trials: 3")
    run_study(SearchSpace.from_text(wide), run, FakeRunner(checkpoints=True))
    changed, _ = change(wide.replace("trials: 3", "trials: 3, baselines: [transformer, gemma3], seeds: 3"), run)

    class FirstIsSlow(FakeRunner):
        def wait(self, timeout: float) -> list[Event]:
            slow, self.jobs = self.jobs[:1], self.jobs[1:]
            if len(self.ran) == 2:
                raise Killed
            events = super().wait(timeout)
            self.jobs = slow
            return events

    with pytest.raises(Killed):
        run_study(changed, run, FirstIsSlow(checkpoints=True))
    run_study(changed, run, FakeRunner(checkpoints=True))  # which refuses a stranger's checkpoint
    assert sum(record.name is not None for record in RunFolder.open(run).records()) == 4


@pytest.mark.parametrize("rungs", ["", ", rungs: [1/4, 1]"])
def test_trials_that_lead_now_and_lost_their_weights_run_again_to_the_end(tmp_path: Path, rungs: str) -> None:
    run = tmp_path / "run"
    text = TEXT.replace("trials: 12", f"trials: 12{rungs}, sampler: random")
    study, _ = run_study(SearchSpace.from_text(text), run, FakeRunner(fault=best_at("0.01"), checkpoints=True))
    trained = [record for record in study.folder.records() if record.status == "complete"]
    assert any(record.train["lr"] != 0.01 for record in trained)
    changed, found = change(text.replace("[1e-3, 3e-3, 1e-2]", "[1e-3, 3e-3]"), run)
    assert found.again
    open_trials = Journal(run / "study.journal", ["min", "min"], Search()).open_trials()
    assert [(o.trial, o.again) for o in sorted(open_trials, key=lambda o: o.trial)] == [(n, True) for n in found.again]
    study, runner = run_study(changed, run, FakeRunner(fault=best_at("0.001"), checkpoints=True))
    ran = Counter(job["job"] for job in runner.ran)
    assert [ran[n] for n in found.again] == [1] * len(found.again)
    records = {record.trial: record for record in study.folder.records()}
    assert all(records[n].status == "complete" for n in found.again)  # no rung stops them
    front = build_front(list(records.values()), study.folder.read_json("settings.json"))
    for point in front.members:
        assert point.record.checkpoint is not None
        assert (run / point.record.checkpoint).exists()


def test_weights_that_nobody_keeps_are_no_reason_to_train_again(tmp_path: Path) -> None:
    for n, text in enumerate((TEXT + "runtime: {keep_checkpoints: none}\n", TEXT.replace("{name: val_bpb}, ", ""))):
        run = tmp_path / str(n)
        untrained = text if n else None

        def fault(job: Mapping[str, Any], untrained: str | None = untrained) -> Event | None:
            if untrained is None:
                return None
            return Event(job["job"], "done", {**outcome(job), "objectives": {}, "metrics": {}, "tokens": 0})

        run_study(SearchSpace.from_text(text), run, FakeRunner(fault=fault))
        assert change(text.replace("[1e-3, 3e-3, 1e-2]", "[1e-3, 3e-3]"), run)[1].again == ()


def test_another_task_is_refused(tmp_path: Path) -> None:
    run_study(SearchSpace.from_text(TEXT), tmp_path / "run")
    with pytest.raises(RunError, match="the task changed"):
        change(TEXT.replace("scales:", "task: {corpus: shakespeare}\nscales:"), tmp_path / "run")
    with pytest.raises(RunError, match="objective prefill_ms was not measured in this run"):
        change(TEXT.replace("{name: state_bytes}", "{name: prefill_ms}"), tmp_path / "run")
    with pytest.raises(RunError, match="objective val_loss was not measured in this run"):
        change(TEXT.replace("{name: val_bpb}", "{name: val_loss}"), tmp_path / "run")


def test_objectives_of_the_layout_come_and_go_and_may_turn_round(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_study(SearchSpace.from_text(TEXT), run, FakeRunner(checkpoints=True))
    before = {r.trial: r for r in RunFolder.open(run).records() if r.status == "complete"}
    turned = TEXT.replace("{name: state_bytes}", "{name: params, goal: max}")
    space, found = change(turned, run)
    assert found.outside == 0
    after = {r.trial: r for r in RunFolder.open(run).records() if r.status == "complete"}
    assert after.keys() == before.keys() - set(found.again)
    for trial, record in after.items():
        assert record.objectives["params"].value == record.metrics["params_target"]
        assert record.objectives["val_bpb"] == before[trial].objectives["val_bpb"]
    front = build_front(list(after.values()), RunFolder.open(run).read_json("settings.json"))
    assert [axis.goal for axis in front.axes] == ["min", "max"]
    study, _ = run_study(space, run, FakeRunner(checkpoints=True))
    assert sum(r.status == "complete" for r in study.folder.records()) == 12


def test_another_limit_moves_what_it_parts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_study(SearchSpace.from_text(TEXT), run, FakeRunner(checkpoints=True))
    before = {r.trial: r for r in RunFolder.open(run).records() if r.status == "complete"}
    sizes = sorted(record.objectives["state_bytes"].value for record in before.values())
    limit = sizes[len(sizes) // 2]
    limited = TEXT.replace("{name: state_bytes}", f"{{name: state_bytes, limit: {limit:.0f}}}")
    changed, found = change(limited, run)
    fitting = {n for n, record in before.items() if record.objectives["state_bytes"].value <= limit}
    assert 0 < len(fitting) < len(before)
    assert found.outside == len(before) - len(fitting)
    run_study(changed, run, FakeRunner(checkpoints=True))
    over = {r.trial for r in RunFolder.open(run).records() if r.reason == "limit"}
    change(TEXT, run)
    assert not over & {r.trial for r in RunFolder.open(run).records()}
    assert fitting <= {r.trial for r in RunFolder.open(run).records()}


def test_a_kill_at_any_step_leaves_the_old_run_or_the_new_one(tmp_path: Path) -> None:
    changed = SearchSpace.from_text(FEWER_RATES)
    run_study(SearchSpace.from_text(TEXT), tmp_path / "old", FakeRunner(checkpoints=True))
    before = RunFolder(tmp_path / "old").records()
    seen = []
    for step in range(40):
        run = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", run)
        child = os.fork()
        if child == 0:
            die_at(step, "replace", "rename", "fsync", "rmdir")
            change(FEWER_RATES, run)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        folder = RunFolder(run)
        with folder.lock():
            is_new = folder.read_json("space.json") == changed.tree
            assert is_new == (folder.read_json("settings.json")["train"] == settings_of(changed)["train"])
            assert is_new == ((run / "space.yaml").read_text() == FEWER_RATES)
            assert is_new == (run / "trials.outside.jsonl").exists()
            assert is_new == (folder.records() != before)
            known = in_the_journal(run)
            assert {r.trial for r in folder.records() if r.status == "complete"} <= known
            first = Journal(run / "study.journal", ["min", "min"], Search()).first
            assert is_new == (first > max(record.trial for record in before))
            seen.append(is_new)
        if not killed:
            break
    assert not killed
    assert seen == sorted(seen)
    assert len(set(seen)) == 2
