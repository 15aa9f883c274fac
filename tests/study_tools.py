"""A runner without processes, a folder to run in and spaces to sample from, for tests of the driver."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from spaces import TINY

from archsearch.architecture import Architecture
from archsearch.launch import settings_of
from archsearch.runners import Event
from archsearch.settings import Search
from archsearch.space import SearchSpace
from archsearch.store import RunFolder
from archsearch.study import Listener, Study
from archsearch.study.journal import Journal

# 4 free blocks of 2 mixers, 2 head groupings and 3 rates: enough to sample from without running dry
EACH = TINY.replace(
    "{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}", "{each: [swa, full]}"
).replace("lr: 3e-3", "lr: {choice: [1e-3, 3e-3, 1e-2]}")
WIDER = EACH.replace("d_model: 32", "d_model: 128").replace("d_model: 64", "d_model: 256")
RUNGS = EACH.replace("trials: 4", "trials: 9, rungs: [1/4, 1], keep: 1/3")
SPACE = SearchSpace.from_text(EACH.replace("trials: 4", "trials: 12"))

Fault = Callable[[Mapping[str, Any]], Event | None]


def loss(job: Mapping[str, Any]) -> float:
    """A made-up quality: more full attention is better, more tokens are better."""
    proxy = Architecture.from_json(job["architecture"]).at("proxy")
    full = sum(block.mixer_name in ("full", "global") for block in proxy.blocks)
    return 3.0 - 0.2 * full + 1000.0 / job["until_tokens"]


def die_at(step: int, *names: str) -> None:
    """This process ends at its n-th call from now on of these functions of `os`: a kill, for a child of a test."""
    left = step

    def counting(was: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return was(*given, **options)

        return call

    for name in names:
        setattr(os, name, counting(getattr(os, name)))


class FakeRunner:
    """Finishes every job at the next `wait`; `fault` may turn a job into another event, or raise to kill the driver.

    checkpoints: every job leaves one as it starts, and goes on from none but its own.
    """

    def __init__(self, slots: int = 2, fault: Fault | None = None, checkpoints: bool = False) -> None:
        self.slots, self.fault, self.checkpoints = slots, fault, checkpoints
        self.jobs: list[Mapping[str, Any]] = []
        self.ran: list[Mapping[str, Any]] = []

    def free(self) -> int:
        return self.slots - len(self.jobs)

    def submit(self, job: Mapping[str, Any]) -> None:
        assert self.free()
        self.jobs.append(job)
        if self.checkpoints:
            path, own = Path(job["checkpoint"]), json.dumps([job["architecture"], job["train"]])
            assert not path.exists() or path.read_text() == own, f"{path.name} is of another trial"
            path.write_text(own)

    def wait(self, timeout: float) -> list[Event]:
        jobs, self.jobs = self.jobs, []
        events = []
        for job in jobs:
            event = self.fault(job) if self.fault is not None else None
            self.ran.append(job)
            events.append(event or Event(job["job"], "done", outcome(job)))
        return events

    def status(self) -> str:
        return ""

    def finish(self) -> None:
        return

    def close(self) -> None:
        self.jobs = []


def outcome(job: Mapping[str, Any]) -> dict[str, Any]:
    tokens = job["train"].get("tokens", 4_000_000)
    return {
        "status": "complete" if job["until_tokens"] >= tokens else "paused",
        "reason": None,
        "message": None,
        "traceback": None,
        "objectives": {"val_bpb": {"value": loss(job), "spread": None, "n": 1}},
        "metrics": {"val_bpb": loss(job)},
        "curve": [(job["until_tokens"], loss(job))],
        "tokens": job["until_tokens"],
        "seconds": {"train": 1.0, "total": 1.1},
        "device": "cpu",
    }


def open_folder(space: SearchSpace, path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.exists:
        folder.create(
            space_yaml=space.source.text,
            space=space.tree,
            settings=settings_of(space),
            environment={"corpus_sha256": None},
        )
    return folder


def run_study(
    space: SearchSpace, path: Path, runner: FakeRunner | None = None, listener: Listener | None = None, **options: Any
) -> tuple[Study, FakeRunner]:
    runner = runner or FakeRunner()
    folder = open_folder(space, path)
    with folder.lock():
        study = Study(space, folder, runner, device="cpu", corpus_sha256=None, listener=listener, **options)
        study.run()
    return study, runner


def optuna_trials(folder: RunFolder) -> list[optuna.trial.FrozenTrial]:
    """What the sampler knows."""
    return Journal(folder.path / "study.journal", ["min", "min"], Search()).study.get_trials(deepcopy=False)


def by_status(folder: RunFolder) -> Counter[str]:
    return Counter(record.status for record in folder.records())
