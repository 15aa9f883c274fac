"""What is tuned for a space: every distinct block, once, in each kind of work its candidates do."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spaces import TINY, WIDE

from archsearch import launch
from archsearch.choosers import RandomChooser
from archsearch.cli import main
from archsearch.data import open_corpus
from archsearch.kernel_tuning import block_works
from archsearch.settings import Runtime
from archsearch.space import SearchSpace
from archsearch.study import Listener
from archsearch.trial import run_trial, tuning_events
from archsearch_kernels.tuner import search

TIMED = TINY.replace("{name: state_bytes}", "{name: decode_ms, at: {batch: 3}}, {name: prefill_ms, at: {context: 128}}")


def test_every_distinct_block_once_in_each_kind_of_work() -> None:
    space = SearchSpace.from_text(TIMED)
    works = block_works(space)
    assert len({json.dumps(work.arguments(), sort_keys=True) for work in works}) == len(works)
    assert {work.work for work in works} == {"train", "judge", "decode", "prefill"}
    shapes = {(w.work, w.model.d_model, w.batch, w.context) for w in works}
    assert shapes == {("train", 32, 4, 64), ("judge", 32, 4, 64), ("decode", 64, 3, 256), ("prefill", 64, 1, 128)}
    mixers = {(w.model.blocks[0].mixer_name, getattr(w.model.blocks[0].mixer, "kv_groups", 1)) for w in works}
    assert mixers == {("full", 1), ("full", 2), ("swa", 1)}
    assert all(work.model.n_blocks == 1 for work in works)
    assert len(works) == 3 * 4


def test_only_what_the_objectives_ask_for() -> None:
    untrained = SearchSpace.from_text(TINY.replace("{name: val_bpb}, {name: state_bytes}", "{name: train_step_ms}"))
    assert {work.work for work in block_works(untrained)} == {"train_step"}


def test_blocks_that_read_from_others_are_tuned_alone() -> None:
    space = SearchSpace.from_text(WIDE)
    candidates = [space.sample(RandomChooser(seed)) for seed in range(20)]
    assert any(b.kv_from is not None for c in candidates for b in c.architecture.at("proxy").blocks)
    for work in block_works(space, candidates):
        (block,) = work.model.blocks
        assert block.kv_from is block.mixer_weights_from is block.ffn_weights_from is None


def test_the_most_frequent_come_first() -> None:
    space = SearchSpace.from_text(TIMED)
    works = block_works(space)
    assert works[0].model.blocks[0].mixer_name == "swa"  # in every candidate, in one variant


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "space.yaml").write_text(TINY)
    for arguments in (["tune", str(tmp_path / "space.yaml")], ["tune", "--export", str(tmp_path / "x.json")]):
        assert main(arguments) == 2
        assert "tuning needs a CUDA device" in capsys.readouterr().err
    assert main(["tune", "--import", str(tmp_path / "none.json")]) == 2
    assert "none.json does not exist" in capsys.readouterr().err
    assert main(["tune", str(tmp_path / "space.yaml"), "--budget", "soon"]) == 2
    assert "found 'soon'; expected a duration" in capsys.readouterr().err


def test_no_trial_tunes_anything() -> None:
    """Counted in the process that times and trains; an outcome carries the number."""
    text = TINY.replace("tokens: 4096", "tokens: 512").replace("{name: state_bytes}", "{name: decode_ms}")
    space = SearchSpace.from_text(text)
    candidate = space.sample(RandomChooser(0))
    corpus = open_corpus(space.task, None)
    job = {
        "architecture": candidate.architecture.to_json(),
        "train": candidate.train.model_dump(mode="json"),
        "task": space.task.model_dump(mode="json"),
        "goals": [goal.model_dump(mode="json") for goal in space.objectives],
        "base_dir": None,
        "corpus_sha256": corpus.sha256,
        "device": "cuda:0" if torch.cuda.is_available() else "cpu",
        "repeats": 3,
        "until_tokens": candidate.train.tokens,
        "checkpoint": None,
        "keep": False,
        "timed": False,
    }
    outcome = run_trial(job, lambda data: None)
    assert outcome["status"] == "complete", outcome["traceback"]
    assert outcome["metrics"]["tuning_events"] == tuning_events()
    before = tuning_events()
    search._events += 1  # and the count would show it
    try:
        assert tuning_events() == before + 1
    finally:
        search._events -= 1


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def failures() -> list[str]:
    """What a tuning could not do."""
    return ["x"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, failures: list[str]) -> list[Any]:
    """What is started in place of `archsearch tune`."""
    made: list[Any] = []
    monkeypatch.setenv("ARCHSEARCH_TUNE", "quick")  # and what a launch sets in its place is taken back

    def run(command: list[str], **options: Any) -> Any:
        made.append((command, options))
        tuned = {"blocks": 3, "tuned": 5, "rows": 30, "left": 2, "seconds": 12.4, "failures": failures}
        return SimpleNamespace(returncode=0, stdout=json.dumps(tuned) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    return made


def test_a_launch_tunes_before_its_trials(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, folder = Notes(), SimpleNamespace(path=tmp_path)
    launch.tune_kernels(Runtime(tune_budget="30 s"), 300, folder, 3, notes)  # type: ignore[arg-type]
    ((command, options),) = calls
    assert command[:4] == [sys.executable, "-m", "archsearch", "tune"]
    assert command[4:] == [str(tmp_path / "space.yaml"), "--json", "--vocab-size", "300", "--budget", "30.0"]
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert notes.notes == ["kernels: 5 launches tuned in 12 s, 2 left for later, 1 failed (tuning.log)"]
    assert os.environ["ARCHSEARCH_TUNE"] == "cached"  # what the workers are told: look up, never time


@pytest.mark.parametrize(("mode", "workers"), [("off", "off"), ("cached", "cached")])
def test_a_launch_that_may_not_tune(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, workers: str
) -> None:
    monkeypatch.setenv("ARCHSEARCH_TUNE", mode)
    launch.tune_kernels(Runtime(), 300, SimpleNamespace(path=tmp_path), 0, Notes())  # type: ignore[arg-type]
    assert calls == []
    assert os.environ["ARCHSEARCH_TUNE"] == workers


def test_kernels_that_are_wrong_are_not_used(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: list[str]
) -> None:
    monkeypatch.delenv("ARCHSEARCH_KERNELS", raising=False)
    failures[:] = ["train kda: differs from the reference (wrong, error 0.9) whatever one configuration is changed"]
    notes = Notes()
    launch.tune_kernels(Runtime(), 300, SimpleNamespace(path=tmp_path), 0, notes)  # type: ignore[arg-type]
    assert os.environ["ARCHSEARCH_KERNELS"] == "reference"
    assert "the study runs without kernels, because they are wrong here: train kda" in notes.notes[1]
    monkeypatch.setenv("ARCHSEARCH_KERNELS", "triton")
    launch.tune_kernels(Runtime(), 300, SimpleNamespace(path=tmp_path), 0, notes)  # type: ignore[arg-type]
    assert os.environ["ARCHSEARCH_KERNELS"] == "triton"


def test_the_words_for_it_are_the_searchs() -> None:
    assert launch.DIFFERS in inspect.getsource(search.culprit)


def test_a_tuning_that_fails_costs_no_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_TUNE", "full")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stdout=""))
    notes = Notes()
    launch.tune_kernels(Runtime(), 300, SimpleNamespace(path=tmp_path), 0, notes)  # type: ignore[arg-type]
    assert notes.notes == [f"kernels were not tuned (exit code 1); see {tmp_path / 'tuning.log'}"]
