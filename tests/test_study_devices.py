"""A study whose objectives name devices: every trial visits each kind, and is trained once."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from study_tools import EACH, FakeRunner, outcome, run_study

from archsearch.errors import SpaceError
from archsearch.runners import Event
from archsearch.space import SearchSpace
from archsearch.study import Listener, Study
from archsearch.study.driver import AHEAD

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
