"""What a worker does of a job that names the device which it runs on."""

from pathlib import Path
from typing import Any

import pytest
from spaces import TINY

from archsearch.architecture import dump
from archsearch.choosers import RandomChooser
from archsearch.data import open_corpus
from archsearch.space import SearchSpace
from archsearch.trial import run_trial

SPACE = TINY.replace(
    "{name: state_bytes}", "{name: decode_ms, at: {device: H100}}, {name: decode_ms, at: {device: H200}}"
)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("state query key value window block\n" * 500)
    space = SearchSpace.from_text(SPACE.replace("archsearch: 1\n", "archsearch: 1\ntask: {corpus: text.txt}\n"))
    candidate = space.sample(RandomChooser(0))
    train = candidate.train.model_copy(update={"tokens": 512, "batch_tokens": 256, "val_tokens": 256})
    return {
        "job": 0,
        "architecture": candidate.architecture.to_json(),
        "train": dump(train),
        "task": dump(space.task),
        "goals": [goal.model_dump(mode="json", exclude_defaults=True) for goal in space.objectives],
        "base_dir": str(tmp_path),
        "corpus_sha256": open_corpus(space.task, tmp_path).sha256,
        "device": "cpu",
        "repeats": 3,
        "until_tokens": 512,
        "checkpoint": None,
        "keep": False,
        "timed": False,
    }


def test_a_visit_measures_what_names_its_device_and_trains_nothing(job: dict[str, Any]) -> None:
    outcome = run_trial({**job, "kind": "H200", "until_tokens": 0}, lambda data: None)
    assert outcome["status"] == "measured", outcome["traceback"]
    assert set(outcome["objectives"]) == {"decode_ms_target_H200"}
    assert "train" not in outcome["seconds"]
    assert outcome["tokens"] == 0


def test_a_study_of_one_kind_does_both_at_once(job: dict[str, Any]) -> None:
    outcome = run_trial({**job, "kind": "H100"}, lambda data: None)
    assert outcome["status"] == "complete", outcome["traceback"]
    assert set(outcome["objectives"]) == {"decode_ms_target_H100", "val_bpb"}
    again = run_trial({**job, "kind": "H100", "timed": True}, lambda data: None)
    assert set(again["objectives"]) == {"val_bpb"}
