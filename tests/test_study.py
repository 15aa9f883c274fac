"""The driver: order, refusals, duplicates, failures, rungs, and what a killed driver leaves behind."""

import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from spaces import TINY
from study_tools import FakeRunner, Fault, outcome, run_study

from archsearch.errors import RunError, SpaceError
from archsearch.report import build_front
from archsearch.report.trust import certificate
from archsearch.runners import Event
from archsearch.settings import Search
from archsearch.space import SearchSpace
from archsearch.store import RunFolder
from archsearch.study import Listener, Study
from archsearch.study.driver import AHEAD
from archsearch.study.journal import Journal, make_sampler

# 4 free blocks of 2 mixers, 2 head groupings and 3 rates: enough to sample from without running dry
EACH = TINY.replace(
    "{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}", "{each: [swa, full]}"
).replace("lr: 3e-3", "lr: {choice: [1e-3, 3e-3, 1e-2]}")
WIDER = EACH.replace("d_model: 32", "d_model: 128").replace("d_model: 64", "d_model: 256")
SPACE = SearchSpace.from_text(EACH.replace("trials: 4", "trials: 12"))


def optuna_trials(folder: RunFolder) -> list[optuna.trial.FrozenTrial]:
    return Journal(folder.path / "study.journal", ["min", "min"], Search()).study.get_trials(deepcopy=False)


def by_status(folder: RunFolder) -> Counter[str]:
    return Counter(record.status for record in folder.records())


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
    assert "is beyond the limit 70000" in (limited[0].message or "")
    assert all(r.objectives["state_bytes"].value <= 70000 for r in study.folder.records() if r.status == "complete")


def test_limits_that_refuse_everything_use_up_the_budget_and_no_more(tmp_path: Path) -> None:
    text = EACH.replace("{name: state_bytes}", "{name: state_bytes, limit: 1}")
    study, runner = run_study(SearchSpace.from_text(text), tmp_path / "run")
    assert [record.reason for record in study.folder.records() if record.reason != "rule"] == ["limit"] * 4
    assert not runner.ran


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


class Killed(BaseException):
    """Stands for kill -9: nothing gets to clean up."""


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


RUNGS = EACH.replace("trials: 4", "trials: 9, rungs: [1/4, 1], keep: 1/3")


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


TWO_DEVICES = EACH.replace(
    "{name: state_bytes}",
    "{name: decode_ms, at: {device: H100}}, {name: prefill_ms, at: {device: H100}}, "
    "{name: decode_ms, at: {device: H200}}",
)


class Kinds(FakeRunner):
    """Two workers each on H100 and H200."""

    def free(self, kind: str | None = None) -> int:
        assert kind in ("H100", "H200")
        return 2 - sum(job["kind"] == kind for job in self.jobs)

    def submit(self, job: Mapping[str, Any]) -> None:
        assert self.free(job["kind"])
        self.jobs.append(job)


def on_its_kind(job: Mapping[str, Any]) -> Event:
    """Measures what names the worker's kind, trains if told to."""
    made = outcome({**job, "until_tokens": job["until_tokens"] or 1})
    if not job["until_tokens"]:
        made |= {"status": "measured", "objectives": {}}
    for goal in job["goals"]:
        kind = goal.get("at", {}).get("device")
        if kind == job["kind"] and not job["timed"]:
            axis = goal["name"] if goal["name"] == "prefill_ms" else f"{goal['name']}_target_{kind}"
            made["objectives"][axis] = {"value": {"H100": 1.0, "H200": 2.0}[kind], "spread": 0.1, "n": 5}
    return Event(job["job"], "done", made)


def test_a_trial_is_measured_on_every_device_that_objectives_name(tmp_path: Path) -> None:
    space = SearchSpace.from_text(TWO_DEVICES.replace("trials: 4", "trials: 8"))
    runner = Kinds(fault=on_its_kind)
    study, _ = run_study(space, tmp_path / "run", runner)
    complete = [record for record in study.folder.records() if record.status == "complete"]
    assert len(complete) == 8
    for record in complete:
        values = {axis: found.value for axis, found in record.objectives.items() if axis != "val_bpb"}
        assert values == {"decode_ms_target_H100": 1.0, "prefill_ms": 1.0, "decode_ms_target_H200": 2.0}
        jobs = [job for job in runner.ran if job["job"] == record.trial]
        assert sorted(job["kind"] for job in jobs[:2]) == ["H100", "H200"]
        assert [job["until_tokens"] > 0 for job in jobs] == [False, False, True]  # trained once, when all is measured
        assert [job["timed"] for job in jobs] == [False, False, True]
        assert record.attempts == 3
    trained_on = Counter(job["kind"] for job in runner.ran if job["until_tokens"])
    assert set(trained_on) == {"H100", "H200"}  # neither kind only measures
    axes = [goal["name"] for goal in study.folder.read_json("settings.json")["objectives"]]
    assert axes == ["val_bpb", "decode_ms_target_H100", "prefill_ms", "decode_ms_target_H200"]


def test_a_crash_while_training_is_tried_again_after_a_visit_elsewhere(tmp_path: Path) -> None:
    crashed: list[int] = []

    def fault(job: Mapping[str, Any]) -> Event:
        if job["until_tokens"] and job["job"] == 0 and not crashed:
            crashed.append(0)
            return Event(0, "lost", reason="crash", message="gone")
        return on_its_kind(job)

    space = SearchSpace.from_text(TWO_DEVICES.replace("trials: 4", "trials: 2"))
    study, _ = run_study(space, tmp_path / "run", Kinds(fault=fault))
    first = next(record for record in study.folder.records() if record.trial == 0)
    assert crashed
    assert (first.status, first.attempts) == ("complete", 4)


def test_a_rare_kind_measures_all_and_trains_few_and_nobody_asks_far_ahead(tmp_path: Path) -> None:
    class OneH200(Kinds):
        most = 0

        def free(self, kind: str | None = None) -> int:
            return (8 if kind == "H100" else 1) - sum(job["kind"] == kind for job in self.jobs)

        def wait(self, timeout: float) -> list[Event]:
            OneH200.most = max(OneH200.most, len(study_of[0].going))
            return super().wait(timeout)

    study_of: list[Any] = []

    class Keep(Listener):
        def started(self, study: Study) -> None:
            study_of.append(study)

    space = SearchSpace.from_text(TWO_DEVICES.replace("trials: 4", "trials: 30"))
    _, runner = run_study(space, tmp_path / "run", OneH200(fault=on_its_kind), Keep())
    trained_on = Counter(job["kind"] for job in runner.ran if job["until_tokens"])
    assert trained_on["H100"] > 2 * trained_on["H200"]
    assert sum(trained_on.values()) == 30
    assert OneH200.most <= 8 + 1 + AHEAD + 8  # at work, and waiting when the last of a round was asked for


def test_devices_of_objectives_are_all_or_none() -> None:
    for objectives, message in (
        ("[val_bpb, {name: decode_ms, at: {device: H100}}, {name: prefill_ms}]", r"objectives\[2\].at names no device"),
        ("[{name: val_bpb, at: {device: H100}}]", r"objectives\[0\].at.device is of no use: val_bpb is not measured"),
    ):
        with pytest.raises(SpaceError, match=message):
            SearchSpace.from_text(EACH.replace("[{name: val_bpb}, {name: state_bytes}]", objectives))


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
