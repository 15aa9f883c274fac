"""Checkpoints on their way between workers: copied when they change, found by the next worker, gone when not needed."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from archsearch.errors import RunError
from archsearch.runners.ray_worker import TrialWorker
from archsearch.runners.storage import Storage


@pytest.fixture(params=["path", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    roots = {"path": f"{tmp_path}/far", "file": f"file://{tmp_path}/far", "memory": f"memory://{tmp_path.name}/far"}
    return Storage(roots[request.param])


def test_a_trial_goes_on_from_what_another_worker_saved(storage: Storage) -> None:
    storage.check()
    job = {"job": 7, "checkpoint": "/of/the/driver", "until_tokens": 10}
    with pytest.raises(KeyboardInterrupt), storage.staged(job) as (staged, save):  # noqa: PT012
        file = Path(staged["checkpoint"])
        assert staged["until_tokens"] == 10
        assert not file.exists()
        assert save() is None
        assert not storage.has(7)
        for text in ("first", "second"):
            file.write_text(text)
            assert save() is None
        file.write_text("never copied: the worker dies")
        raise KeyboardInterrupt
    assert not file.exists()
    with storage.staged(job) as (staged, save):
        file = Path(staged["checkpoint"])
        assert file.read_text() == "second"
        file.write_text("third")
    assert storage.pull(7, file.parent.parent / "here") is True
    assert (file.parent.parent / "here").read_text() == "third"
    (file.parent.parent / "here").unlink()
    storage.delete(7)
    storage.delete(7)
    assert not storage.has(7)
    assert not storage.pull(7, file)


def test_what_does_not_change_is_not_copied_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[int] = []
    monkeypatch.setattr(Storage, "push", lambda self, trial, file: pushed.append(trial))
    with storage.staged({"job": 1}) as (staged, save):
        Path(staged["checkpoint"]).write_text("once")
        save()
        save()
    assert pushed == [1]


def test_a_storage_that_is_away_costs_no_training_but_the_end_must_arrive(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Storage, trial: int, file: Path) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(Storage, "push", fails)
    with pytest.raises(OSError, match="no route"), storage.staged({"job": 1}) as (staged, save):  # noqa: PT012
        Path(staged["checkpoint"]).write_text("text")
        assert save() == "OSError: no route to host"


def test_clear_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for trial in (1, 2):
        storage.push(trial, tmp_path / "file")
        storage.push(trial, tmp_path / "file")
    assert storage.has(1)
    storage.clear()
    assert not storage.has(1)
    storage.clear()


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match=r"runtime.storage '.*file/sub' cannot be used"):
        Storage(f"{tmp_path}/file/sub").check()
    with pytest.raises(RunError, match="nosuch"):
        Storage("nosuch://bucket").check()


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, "unwritable"), (errno.EIO, "raised")])
def test_a_storage_without_room_is_told_and_not_held_against_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    def push(self: Storage, trial: int, file: Path) -> None:
        raise OSError(number, os.strerror(number))

    def run_trial(job: dict[str, Any], report: Any) -> dict[str, Any]:
        Path(job["checkpoint"]).write_text("trained")
        return {"status": "complete", "message": None}

    monkeypatch.setattr(Storage, "push", push)
    worker = TrialWorker(json.dumps({"storage": f"{tmp_path}/far", "variables": {}}))
    worker.run_trial = run_trial
    if kind == "raised":
        with pytest.raises(OSError, match=os.strerror(number)):
            worker.run(json.dumps({"job": 1}))
        return
    told = json.loads(worker.run(json.dumps({"job": 1})))
    assert told["status"] == "unwritable"
    assert told["message"].startswith(f"{tmp_path}/far: No space left on device; make room there and give the same ")
