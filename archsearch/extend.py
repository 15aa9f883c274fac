"""`--extend`: go on in a run folder with a changed space, keeping every trial that is still inside it.

A trial stays if its hole values still lead to the same architecture trained the same way, and no rule refuses it.
The others move to trials.outside.jsonl; the sampler's journal is written anew from those that stay. Where the trials
that left had kept one from the front, its weights are gone, since a run keeps those of its front only: it runs again.

No number is ever given twice, because checkpoints are named by it, here and in a cluster's storage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from archsearch.architecture import Architecture, dump
from archsearch.choosers import FixedChooser
from archsearch.errors import RunError, SpaceError
from archsearch.objectives import axis_name, direction, exceeds, objective, read_layout
from archsearch.pareto import front, to_minimise
from archsearch.recipes import baseline
from archsearch.settings import Goal
from archsearch.space import SearchSpace
from archsearch.store import Measured, RunFolder, TrialRecord
from archsearch.study.candidates import was_run
from archsearch.study.journal import Journal

FREE = ("goal", "limit")  # of an objective: what a value means does not depend on them


@dataclass(frozen=True)
class Extended:
    """What became of the trials that had run: how many stay, how many are outside, which ones run again."""

    stay: int
    outside: int
    again: tuple[int, ...]

    def text(self) -> str:
        """For people."""
        of = self.stay + self.outside + len(self.again)
        found = f"the space changed: of {of} trials that ran {self.stay} stay, {self.outside} are outside of it now"
        if self.outside:
            found += " (trials.outside.jsonl)"
        if self.again:
            numbers = ", ".join(map(str, self.again))
            found += f"; now on the front, but without their weights, so they run again: trials {numbers}"
        return found


def extend(space: SearchSpace, folder: RunFolder, settings: dict[str, Any]) -> Extended:
    """Rewrite the folder for `space`, all of it or, if killed on the way, nothing.

    Raises RunError if the task changed or an objective is new that nothing measured yet, since then no result compares.
    The caller holds the folder's lock.
    """
    before, now = folder.read_json("settings.json"), json.loads(json.dumps(settings))
    if before["task"] != now["task"]:
        raise RunError("the task changed: results would not compare. Give the space another name")
    new = _new_objectives(space, before["objectives"], now["objectives"])
    records = [_with_objectives(record, space, new) for record in folder.records()]
    inside = [record for record in records if _is_inside(space, record)]
    again = _without_weights(space, folder, inside)
    leaving = {record.trial for record in records} - {record.trial for record in inside}
    outside = [record for record in records if record.trial in leaving]
    numbers = tuple(sorted(record.trial for record in again))
    kept = [record for record in inside if record.trial not in numbers]
    aside = folder.path / "trials.outside.jsonl"
    left_before = aside.read_bytes() if aside.exists() else b""
    first = _next_number(folder, before, records, space)
    with folder.replacing() as made:
        _write_journal(space, made, first, kept, again)
        made.write_bytes("trials.outside.jsonl", left_before + _lines([*outside, *again]))
        made.write_bytes("trials.jsonl", _lines(kept))
        made.write_bytes("rungs.jsonl", b"")
        made.write_text("space.yaml", space.source.text)
        made.write_json("space.json", space.tree)
        made.write_json("settings.json", settings)
    return Extended(sum(map(was_run, kept)), sum(map(was_run, outside)), numbers)


def _new_objectives(space: SearchSpace, before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[Goal]:
    """Those that the run did not have, all of which layouts alone decide; raises RunError on another."""
    known = [{key: value for key, value in entry.items() if key not in FREE} for entry in before]
    new = []
    for goal, entry in zip(space.objectives, now, strict=True):
        if {key: value for key, value in entry.items() if key not in FREE} not in known:
            if objective(goal).stage != "graph":
                raise RunError(f"objective {entry['name']} was not measured in this run. Give the space another name")
            new.append(goal)
    return new


def _with_objectives(record: TrialRecord, space: SearchSpace, new: Sequence[Goal]) -> TrialRecord:
    """The record with the objectives that its layout alone decides."""
    if not new or not record.architecture:
        return record
    architecture = Architecture.from_json(record.architecture)
    found = {axis_name(goal, space.objectives): Measured(value=read_layout(goal, architecture).value) for goal in new}
    return record.model_copy(update={"objectives": {**record.objectives, **found}})


def _lines(records: Sequence[TrialRecord]) -> bytes:
    return b"".join(record.to_line() for record in records)


def _is_inside(space: SearchSpace, record: TrialRecord) -> bool:
    if record.repeat_of is not None or not _is_judged_alike(space, record):
        return False
    if record.name is not None:
        try:
            candidate = baseline(record.name, space)
        except SpaceError:
            return False
        return candidate.architecture.arch_id == record.arch_id and dump(candidate.train) == record.train
    if record.status in ("duplicate", "stopped"):
        return False
    try:
        candidate = space.sample(FixedChooser(record.holes))
    except (KeyError, ValueError):
        return False
    same = candidate.architecture.arch_id == record.arch_id and dump(candidate.train) == record.train
    return same and (record.reason in ("rule", "graph") or space.refusal(candidate) is None)


def _is_judged_alike(space: SearchSpace, record: TrialRecord) -> bool:
    """Whether the limits let through what they let through, and refuse what they refused."""
    is_over = any(
        exceeds(goal, record.objectives[axis].value)
        for goal in space.objectives
        if (axis := axis_name(goal, space.objectives)) in record.objectives
    )
    return is_over == (record.reason == "limit")


def _without_weights(space: SearchSpace, folder: RunFolder, inside: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trained trials that are on the front now and have no checkpoint, though the space wants to keep it."""
    complete = [record for record in inside if record.status == "complete"]
    if space.runtime.keep_checkpoints == "none" or not complete:
        return []
    goals = space.objectives
    rows = [[record.objectives[axis_name(goal, goals)].value for goal in goals] for record in complete]
    leading = [complete[i] for i in front(to_minimise(rows, [direction(goal) for goal in goals]))]
    return [
        record
        for record in leading
        if record.tokens
        and (record.name is None or record.name in space.search.baselines)
        and (record.checkpoint is None or not folder.inside(record.checkpoint).is_file())
    ]


def _next_number(folder: RunFolder, before: dict[str, Any], records: Sequence[TrialRecord], space: SearchSpace) -> int:
    """One above every number that was given, recorded or not: to what was asked, and to the baselines."""
    search = before["search"]
    first = highest = 0
    if (folder.path / "study.journal").exists():
        journal = Journal(folder.path / "study.journal", [direction(goal) for goal in space.objectives], space.search)
        first, highest = journal.first, journal.highest_trial()
    planned = first + len(search["baselines"]) + search["seeds"] - 1
    return max(int(planned), highest + 1, *(record.trial + 1 for record in records))


def _write_journal(
    space: SearchSpace, new: RunFolder, first: int, kept: Sequence[TrialRecord], again: Sequence[TrialRecord]
) -> None:
    """What the sampler may learn from: complete trials; those that run again are open in it."""
    goals = space.objectives
    axes = [axis_name(goal, goals) for goal in goals]
    rules = [rule.text for rule in space.rules]
    journal = Journal(new.path / "study.journal", [direction(goal) for goal in goals], space.search, rules)
    journal.begin_at(first)
    for record in kept:
        if record.name is None and record.status == "complete":
            values = [record.objectives[axis].value for axis in axes]
            with journal.add(record.trial, FixedChooser(record.holes), values) as chooser:
                space.sample(chooser)
    for record in again:
        if record.name is None:
            with journal.add(record.trial, FixedChooser(record.holes), None) as chooser:
                space.sample(chooser)
    journal.sync()
