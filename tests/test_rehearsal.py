"""What a Ray worker runs before its first trial, and what becomes of a worker that fails at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray_pool import H100, Body, fake_runner, hosts, needs_ray, settle
from spaces import TINY

from archsearch.data import open_corpus
from archsearch.rehearsal import rehearsal
from archsearch.space import SearchSpace
from archsearch.trial import run_trial

JOB = {"job": -1}


def space_of(tmp_path: Path, text: str = TINY) -> SearchSpace:
    (tmp_path / "text.txt").write_text("state query key value window block\n" * 500)
    (tmp_path / "space.yaml").write_text(text.replace("archsearch: 1\n", "archsearch: 1\ntask: {corpus: text.txt}\n"))
    return SearchSpace.load(tmp_path / "space.yaml")


def test_a_rehearsal_has_a_block_of_every_kind_and_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    gdn = "mixers:\n  gdn: {kind: gated_deltanet, head_dim: 16}\n"
    text = TINY.replace("mixers:\n", gdn).replace(
        "{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}", "{each: [full, swa, gdn]}"
    )
    timed = "[{name: val_bpb}, {name: decode_ms, at: {context: 999999, batch: 2}, limit: 1e-9}, {name: state_bytes}]"
    space = space_of(tmp_path, text.replace("[{name: val_bpb}, {name: state_bytes}]", timed))
    job = rehearsal(space, "cpu", open_corpus(space.task, space.base_dir).sha256)
    assert job is not None
    json.dumps(job)
    kinds = sorted(block["mixer"]["kind"] for block in job["architecture"]["proxy"]["blocks"])
    assert kinds == ["attention", "gated_deltanet"]
    outcome = run_trial(job, lambda data: None)
    assert outcome["status"] == "complete", outcome["traceback"]
    assert outcome["tokens"] == 256
    assert set(outcome["objectives"]) == {"val_bpb", "decode_ms"}


def test_nothing_of_ours_is_nothing_to_rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(tmp_path)
    monkeypatch.setattr("archsearch.architecture.MIXERS.table", {})
    assert rehearsal(space, "cpu", None) is None


class Rehearser(Body):
    """Notes its rehearsal; `rehearsal` among its facts says how it ends."""

    def rehearse(self, job: str) -> str:
        self.calls.append((self.node, f"rehearse {json.loads(job)['job']}"))
        return json.dumps({"status": self.facts.get("rehearsal", "complete"), "message": "no room"})


@needs_ray
def test_a_worker_rehearses_once_before_its_first_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fake_runner(monkeypatch, {"h100-1": H100}, body=Rehearser, rehearsal=JOB)
    runner.submit({"job": 0})
    settle(runner)
    runner.submit({"job": 1})
    settle(runner)
    assert runner.calls == [("h100-1", "rehearse -1"), ("h100-1", "run"), ("h100-1", "run")]


@needs_ray
def test_a_failed_rehearsal_is_told_and_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"h100-1": {"rehearsal": "infeasible"}}
    runner = fake_runner(monkeypatch, {"h100-1": H100}, facts=facts, body=Rehearser, rehearsal=JOB)
    notes = settle(runner)
    assert any("rehearsal failed" in note and "no room" in note for note in notes), notes
    assert hosts(runner) == {"h100-1"}


@needs_ray
def test_a_worker_that_hangs_in_its_rehearsal_is_replaced_by_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fake_runner(monkeypatch, {"h100-1": H100}, body=Rehearser, rehearsal=JOB)
    hear = runner._hear

    def deaf(pause: float) -> list[Any]:
        """The answer of the first rehearsal never comes."""
        rehearsing = [worker for worker in runner.pool if worker.state == "rehearsing"]
        for worker in rehearsing:
            worker.call, worker.deadline = None, 0.0
        return [] if rehearsing else hear(pause)

    monkeypatch.setattr(runner, "_hear", deaf)
    notes = settle(runner)
    assert any("without a rehearsal" in note and "longer than 300 s" in note for note in notes), notes
    assert runner.calls == []  # the fake works when it is heard
    assert hosts(runner) == {"h100-1"}
