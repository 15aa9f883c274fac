"""What a worker does of a job: on the device that it names, near a limit, with a disk that takes no more."""

import errno
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from spaces import TINY

from archsearch import checkpoint, trial
from archsearch.architecture import dump
from archsearch.choosers import RandomChooser
from archsearch.data import open_corpus
from archsearch.errors import NonFiniteError
from archsearch.latency.measure import Bench, Timing
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


def test_a_spec_that_miscounts_its_parameters_fails_the_trial(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archsearch.cost.params", lambda model: 7)
    outcome = run_trial({**job, "timed": True}, lambda data: None)
    assert (outcome["status"], outcome["reason"]) == ("infeasible", "exception")
    assert "its specs count 7: see num_params of a kind of archsearch" in outcome["message"]
    assert "train" not in outcome["seconds"]


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


LIMITED = [{"name": "decode_ms", "limit": 50}]


def readings(monkeypatch: pytest.MonkeyPatch, found: Sequence[tuple[float, float]]) -> list[int]:
    """`decode` finds these medians and spreads in turn; the list fills with the repeats it was asked for."""
    asked: list[int] = []
    left = iter(found)

    def decode(self: Bench, *, context: int, batch: int, repeats: int) -> Timing:
        asked.append(repeats)
        value, spread = next(left)
        return Timing(value, value - spread, value + spread, value, repeats, 3)

    monkeypatch.setattr(Bench, "decode", decode)
    return asked


@pytest.mark.parametrize(
    ("found", "kept", "is_refused"),
    [
        ([(49.0, 30.0)], 49.0, False),  # within the limit, however noisy
        ([(51.0, 0.5)], 51.0, True),  # beyond it by more than its spread
        ([(51.0, 2.0), (49.0, 0.5)], 49.0, False),
        ([(51.0, 2.0), (52.0, 1.0)], 52.0, True),  # now without doubt
        ([(51.0, 2.0), (49.0, 3.0), (52.0, 4.0)], 51.0, True),  # the quietest of three
        ([(90.0, 30.0), (80.0, 25.0), (48.0, 3.0)], 48.0, False),  # noisy, though far beyond
        ([(90.0, 30.0), (80.0, 25.0), (81.0, 28.0)], 80.0, True),
    ],
)
def test_what_noise_may_have_put_beyond_a_limit_is_measured_anew(
    job: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    found: list[tuple[float, float]],
    kept: float,
    is_refused: bool,
) -> None:
    asked = readings(monkeypatch, found)
    outcome = run_trial({**job, "goals": LIMITED}, lambda data: None)
    assert asked == [3, 6, 12][: len(found)]
    assert outcome["objectives"]["decode_ms"]["value"] == kept
    assert outcome["reason"] == ("limit" if is_refused else None), outcome["traceback"]
    if is_refused and len(found) > 1:
        assert outcome["message"].endswith(f"is beyond the limit 50, measured {len(found)} times")


def test_a_limit_on_what_has_no_spread_is_read_once(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count()
    monkeypatch.setattr(Bench, "peak_memory", lambda self, **where: 100 + next(asked))
    goals = [{"name": "peak_memory", "limit": 99}]
    message = run_trial({**job, "goals": goals}, lambda data: None)["message"]
    assert message == "peak_memory 100 B is beyond the limit 99 B"
    assert next(asked) == 1


def full(number: int) -> Any:
    def save_file(*given: Any, **options: Any) -> None:
        said = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
        raise SafetensorError(said) if number == errno.ENOSPC else OSError(number, os.strerror(number))

    return save_file


def test_a_finished_trial_leaves_its_weights_and_a_stopped_one_all_it_needs(
    job: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "0.safetensors"
    job = {**job, "goals": [{"name": "val_bpb"}], "checkpoint": str(path), "keep": True}
    stopped = run_trial({**job, "until_tokens": 256}, lambda data: None)
    assert (stopped["status"], stopped["seconds"]["save"] > 0) == ("paused", True)
    halfway = checkpoint.load(path)
    finished = run_trial(job, lambda data: None)
    assert (finished["status"], finished["tokens"]) == ("complete", 512)
    end = checkpoint.load(path)
    assert end.model_state().keys() == halfway.model_state().keys()
    assert any(name.startswith(checkpoint.OPTIMIZER) for name in halfway.tensors)
    assert not any(name.startswith(checkpoint.OPTIMIZER) for name in end.tensors)
    again = run_trial(job, lambda data: None)  # as after a kill between the last checkpoint and the record
    assert (again["status"], again["objectives"]) == ("complete", finished["objectives"])
    assert again["curve"] == finished["curve"]


def test_a_training_that_fails_has_its_seconds(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise NonFiniteError("loss", 3)

    monkeypatch.setattr(trial, "train", fails)
    outcome = run_trial({**job, "goals": [{"name": "val_bpb"}]}, lambda data: None)
    assert (outcome["status"], outcome["reason"]) == ("infeasible", "non_finite")
    assert outcome["seconds"]["train"] > 0


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room there and"),
        (errno.EDQUOT, "make room there or have the quota raised and"),
        (errno.EROFS, "make that file system writable again and"),
    ],
)
def test_a_disk_that_takes_no_checkpoint_is_not_the_candidates_fault(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    path = tmp_path / "checkpoints" / "0.safetensors"
    monkeypatch.setattr(checkpoint, "save_file", full(number))
    job = {**job, "goals": [{"name": "val_bpb"}], "checkpoint": str(path), "keep": True}
    outcome = run_trial(job, lambda data: None)
    assert (outcome["status"], outcome["reason"]) == ("unwritable", None)
    assert outcome["message"] == (
        f"{path}: {os.strerror(number)}; {remedy} give the same command again (a study goes on where it stopped)"
    )
    json.dumps(outcome)


def test_other_writes_are_told_by_their_place_and_other_errors_stay_records(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> dict[str, Any]:
        def train(*given: Any, **options: Any) -> None:
            try:
                raise error
            except OSError as was:
                raise RuntimeError("what came of it") from was

        monkeypatch.setattr(trial, "train", train)
        return run_trial({**job, "goals": [{"name": "val_bpb"}]}, lambda data: None)

    unnamed = fails(OSError(errno.ENOSPC, "No space left on device"))
    assert unnamed["status"] == "unwritable"
    assert unnamed["message"].startswith(f"a write in {__file__}, line ")
    assert fails(OSError(errno.ENOSPC, "No space", "/var/cache/x"))["message"].startswith("/var/cache/x: No space left")
    assert fails(OSError(errno.EIO, "Input/output error"))["reason"] == "exception"
