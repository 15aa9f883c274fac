"""The driver: order, refusals, duplicates, failures, rungs."""

import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from spaces import TINY
from study_tools import EACH, RUNGS, SPACE, WIDER, FakeRunner, by_status, optuna_trials, outcome, run_study

from archsearch.errors import RunError, SpaceError
from archsearch.report import build_front
from archsearch.report.trust import certificate
from archsearch.runners import Event
from archsearch.settings import Search
from archsearch.space import SearchSpace
from archsearch.store import RunFolder
from archsearch.study.journal import make_sampler


def test_a_study_runs_its_budget_and_tells_the_sampler(tmp_path: Path) -> None:
    study, runner = run_study(SPACE, tmp_path / "run")
    records = study.folder.records()
    ran = [record for record in records if record.status == "complete"]
    assert len(ran) == 12 == len(runner.ran)
    keys = {(record.arch_id, record.train.get("lr")) for record in ran}
    assert len(keys) == 12  # nothing trained twice
    told = {t.user_attrs["trial"]: t for t in optuna_trials(study.folder)}
    for record in ran:
        assert told[record.trial].values == [record.objectives[axis].value for axis in ("val_bpb", "state_bytes")]
        assert set(record.metrics) >= {"params_proxy", "params_target", "state_bytes_target", "flops_per_token_target"}
    assert not [t for t in told.values() if t.state == optuna.trial.TrialState.RUNNING]


def test_baselines_come_first_and_stay_out_of_the_samplers_sight(tmp_path: Path) -> None:
    space = SearchSpace.from_text(WIDER.replace("trials: 4", "trials: 3, baselines: [transformer, gemma3]"))
    study, _ = run_study(space, tmp_path / "run", FakeRunner(slots=1))
    names = [record.name for record in study.folder.records()]
    assert names[:2] == ["transformer", "gemma3"]
    assert len(names) == 5
    assert len(optuna_trials(study.folder)) == 3


def test_seeds_of_the_first_baseline_measure_the_noise(tmp_path: Path) -> None:
    space = SearchSpace.from_text(WIDER.replace("trials: 4", "trials: 3, baselines: [transformer, gemma3], seeds: 3"))

    def fault(job: Mapping[str, Any]) -> Event | None:
        shifted = outcome(job)
        shifted["objectives"]["val_bpb"]["value"] += 0.1 * job["train"].get("seed", 0)
        return Event(job["job"], "done", shifted)

    study, _ = run_study(space, tmp_path / "run", FakeRunner(fault=fault))
    records = study.folder.records()
    repeats = [record for record in records if record.repeat_of is not None]
    assert [record.name for record in repeats] == ["transformer, seed 1", "transformer, seed 2"]
    assert len({record.arch_id for record in records if (record.name or "").startswith("transformer")}) == 1
    front = build_front(records, study.folder.read_json("settings.json"))
    assert front.n_seeds == 3
    assert front.spreads["val_bpb"] == pytest.approx(0.1)  # the standard deviation of 0, 0.1 and 0.2
    assert {point.record.name for point in front.baselines} == {"transformer", "gemma3"}
    told = certificate(front, study.folder.read_json("settings.json"))
    assert told["seeds"] == 3
    assert any("over 3 seeds" in statement for statement in told["statements"])
    assert run_study(space, tmp_path / "run")[1].ran == []


def test_rules_refuse_before_anything_runs(tmp_path: Path) -> None:
    text = EACH + "rules: ['mixer[0] == swa', 'count(full, proxy) >= 1']\n"
    study, runner = run_study(SearchSpace.from_text(text), tmp_path / "run")
    refused = [record for record in study.folder.records() if record.reason == "rule"]
    assert refused
    assert {job["job"] for job in runner.ran}.isdisjoint({record.trial for record in refused})
    assert all("is false" in (record.message or "") for record in refused)
    assert by_status(study.folder)["complete"] == 4
    constraints = [t.constraints for t in optuna_trials(study.folder) if t.user_attrs["trial"] == refused[-1].trial]
    assert max(constraints[0].values()) > 0


def test_options_that_make_nothing_together_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TINY.replace("swa: {choice: [1, 3]}, full: 1}", "swa: {choice: [1, 0]}, full: {choice: [1, 0]}}")
    space = SearchSpace.from_text(text.replace("trials: 4", "trials: 12"))
    study, _ = run_study(space, tmp_path / "run")
    assert study.unmade
    assert by_status(study.folder)["complete"] >= 2

    def none(*_: object) -> None:
        raise SpaceError("space:1: layout.mixer.ratio has no share above 0")

    monkeypatch.setattr("archsearch.study.driver.MAX_REFUSALS", 20)
    monkeypatch.setattr(SearchSpace, "sample", none)
    with pytest.raises(RunError, match=r"most often: space:1: layout\.mixer\.ratio has no share"):
        run_study(SearchSpace.from_text(text.replace("trials: 4", "trials: 4, baselines: []")), tmp_path / "none")


def test_impossible_rules_end_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.study.driver.MAX_REFUSALS", 20)
    space = SearchSpace.from_text(EACH + "rules: [count(full) > 100]\n")
    with pytest.raises(RunError, match=r"no candidate passed the rules; most often: count\(full\) > 100 is false"):
        run_study(space, tmp_path / "run")


def test_limits_on_what_the_graph_tells_cost_no_training(tmp_path: Path) -> None:
    text = EACH.replace("{name: state_bytes}", "{name: state_bytes, limit: 70000}")
    study, runner = run_study(SearchSpace.from_text(text), tmp_path / "run")
    limited = [record for record in study.folder.records() if record.reason == "limit"]
    assert limited
    assert {job["job"] for job in runner.ran}.isdisjoint({record.trial for record in limited})
    assert "is beyond the limit 68.4 KiB" in (limited[0].message or "")
    assert all(r.objectives["state_bytes"].value <= 70000 for r in study.folder.records() if r.status == "complete")


def test_limits_that_refuse_everything_use_up_the_budget_and_no_more(tmp_path: Path) -> None:
    text = EACH.replace("{name: state_bytes}", "{name: state_bytes, limit: 1}")
    study, runner = run_study(SearchSpace.from_text(text), tmp_path / "run")
    assert [record.reason for record in study.folder.records() if record.reason != "rule"] == ["limit"] * 4
    assert not runner.ran


def test_a_space_that_runs_dry_ends_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.study.driver.MAX_DUPLICATES", 40)
    study, runner = run_study(SearchSpace.from_text(TINY.replace("trials: 4", "trials: 50")), tmp_path / "run")
    assert len(runner.ran) == 8  # all there are
    assert study.exhausted is not None
    duplicates = [record for record in study.folder.records() if record.status == "duplicate"]
    trained = {record.trial: record.arch_id for record in study.folder.records() if record.status == "complete"}
    assert duplicates
    assert all(trained[d.copy_of] == d.arch_id for d in duplicates if d.copy_of is not None)


@pytest.mark.parametrize("sampler", ["auto", "tpe", "nsga2", "nsga3", "random", "gp"])
def test_every_sampler_takes_every_kind_of_result(tmp_path: Path, sampler: str) -> None:
    turn = itertools.count()

    def fault(job: Mapping[str, Any]) -> Event | None:
        if next(turn) % 5 == 3:
            failed = {**outcome(job), "status": "infeasible", "reason": "non_finite", "message": "NaN at step 3"}
            return Event(job["job"], "done", failed)
        return None

    n_trials = 5 if sampler == "gp" else 12  # a Gaussian process takes seconds to ask, more with trials running
    text = EACH.replace("trials: 4", f"trials: {n_trials}, sampler: {sampler}") + "rules: ['mixer[0] == swa']\n"
    slots = 1 if sampler == "gp" else 2
    study, runner = run_study(SearchSpace.from_text(text), tmp_path / "run", FakeRunner(slots, fault))
    statuses = Counter((r.status, r.reason) for r in study.folder.records())
    assert statuses["complete", None] + statuses["infeasible", "non_finite"] == n_trials == len(runner.ran)
    assert statuses["infeasible", "non_finite"] > 0


def test_auto_is_tpe_with_the_settings_that_hybrids_need() -> None:
    sampler = make_sampler(Search(trials=64), 0)
    assert isinstance(sampler, optuna.samplers.TPESampler)
    assert sampler._multivariate
    assert sampler._group
    assert sampler._constant_liar
    assert isinstance(make_sampler(Search(trials=5000), 0), optuna.samplers.NSGAIISampler)


def test_lost_workers_run_once_more_then_are_recorded(tmp_path: Path) -> None:
    seen: Counter[int] = Counter()

    def fault(job: Mapping[str, Any]) -> Event | None:
        seen[job["job"]] += 1
        if job["job"] == 1 or (job["job"] == 2 and seen[2] == 1):
            return Event(job["job"], "lost", reason="crash", message="the worker process was ended by SIGSEGV")
        if job["job"] == 3:
            return Event(job["job"], "lost", reason="timeout", message="took longer than 5 s")
        return None

    study, _ = run_study(SPACE, tmp_path / "run", FakeRunner(fault=fault))
    records = {record.trial: record for record in study.folder.records()}
    assert (records[1].reason, records[1].attempts) == ("crash", 2)
    assert "SIGSEGV" in (records[1].message or "")
    assert (records[2].status, records[2].attempts) == ("complete", 2)
    assert (records[3].reason, records[3].attempts) == ("timeout", 1)  # a hang is not worth another wait


def test_a_disk_that_takes_no_more_stops_the_study_and_teaches_the_sampler_nothing(tmp_path: Path) -> None:
    where = tmp_path / "run"
    stopped: list[int] = []

    def fault(job: Mapping[str, Any]) -> Event | None:
        if job["job"] in (2, 4):
            stopped.append(job["job"])
            told = {**outcome(job), "objectives": {}, "status": "unwritable", "message": "/disk: full; make room"}
            return Event(job["job"], "done", told)
        return None

    with pytest.raises(RunError, match=r"^trial 2 cannot be run: /disk: full; make room$"):
        run_study(SPACE, where, FakeRunner(slots=3, fault=fault))
    folder = RunFolder(where)
    assert stopped == [2]
    before = folder.records()
    assert {r.trial for r in before if r.status == "complete"} == {0, 1}  # 1 ended together with 2
    assert 2 not in {record.trial for record in before}
    told = {t.user_attrs["trial"]: t.state.name for t in optuna_trials(folder)}
    assert [told[trial] for trial in (0, 1, 2)] == ["COMPLETE", "COMPLETE", "RUNNING"]
    study, runner = run_study(SPACE, where)
    assert runner.ran[0]["job"] == 2
    assert by_status(study.folder)["complete"] == 12
    assert by_status(study.folder)["infeasible"] == 0


def test_rungs_train_only_the_best_to_the_end(tmp_path: Path) -> None:
    study, runner = run_study(SearchSpace.from_text(RUNGS), tmp_path / "run", FakeRunner(slots=1))
    assert by_status(study.folder) == {"complete": 3, "stopped": 6, **_duplicates(study.folder)}
    budgets = Counter(job["until_tokens"] for job in runner.ran)
    assert budgets == {1024: 9, 4096: 3}
    promoted = [job for job in runner.ran if job["until_tokens"] == 4096]
    assert all(job["timed"] for job in promoted)  # latency is not measured twice
    states = Counter(t.state.name for t in optuna_trials(study.folder) if t.user_attrs["trial"] in study.records)
    assert states["PRUNED"] == 6


def _duplicates(folder: RunFolder) -> dict[str, int]:
    n = by_status(folder)["duplicate"]
    return {"duplicate": n} if n else {}
