"""A job that a worker runs before its first trial, to load what all trials need: libraries, kernels, device handles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from archsearch.architecture import Architecture, Block, dump
from archsearch.choosers import drawn
from archsearch.objectives import OBJECTIVES, objective
from archsearch.settings import Goal, Workload
from archsearch.space import Candidate, SearchSpace
from archsearch.tasks import TASKS

LOOKS = 32  # candidates that are looked at for kinds of blocks
REPEATS = 1


def rehearsal(space: SearchSpace, device: str, corpus_sha256: str | None) -> dict[str, Any] | None:
    """A job as `archsearch.trial.run_trial` takes it, or None if there is nothing of our own to rehearse.

    One step of a model with one block of every kind that the space has, at the width and context of the proxy, timed
    there for every timed objective. Plug-ins are left out: what they do wrong is for their trials to say.
    """
    candidates = list(drawn(space, range(LOOKS)))
    if not candidates:
        return None
    model = candidates[0].architecture.at("proxy")
    blocks = _blocks(candidates)
    if not blocks or model.task not in TASKS.table:
        return None
    proxy = replace(model, blocks=blocks)
    train = candidates[0].train
    step = train.step_tokens(proxy.context)
    train = train.model_copy(update={"tokens": step, "val_tokens": step})
    ours = [_anywhere(goal) for goal in space.objectives if goal.name in OBJECTIVES.table]
    goals = [goal for goal in dict.fromkeys(ours) if objective(goal).stage != "graph"]
    target = replace(proxy, dtype=candidates[0].architecture.at("target").dtype)
    return {
        "job": -1,
        "architecture": Architecture({"proxy": proxy, "target": target}).to_json(),
        "train": dump(train),
        "task": dump(space.task),
        "goals": [goal.model_dump(mode="json", exclude_defaults=True) for goal in goals],
        "base_dir": str(space.base_dir),
        "corpus_sha256": corpus_sha256,
        "device": device,
        "repeats": REPEATS,
        "until_tokens": step,
        "checkpoint": None,
        "keep": False,
        "timed": False,
    }


def _blocks(candidates: list[Candidate]) -> tuple[Block, ...]:
    """One block of each pair of kinds, of its own weights and keys."""
    found: dict[tuple[str, str], Block] = {}
    for candidate in candidates:
        for block, _ in candidate.architecture.at("proxy").distinct:
            if block.is_built_in and block.mixer.kind != "parallel":
                found.setdefault((block.mixer.kind, block.ffn.kind), Block(block.mixer, block.ffn))
    return tuple(found.values())


def _anywhere(goal: Goal) -> Goal:
    """The same at the scale's own context, on whatever device, without limit."""
    return Goal(name=goal.name, at=Workload(batch=goal.at.batch))
