"""`--extend`: go on in a run folder with a changed space, keeping every trial that is still inside it.

A trial stays if its hole values still lead to the same architecture trained the same way, and no rule refuses it.
The others move to trials.outside.jsonl; the sampler's journal is written anew from those that stay.
"""

from __future__ import annotations

import json
from typing import Any

from archsearch.architecture import dump
from archsearch.choosers import FixedChooser
from archsearch.errors import RunError, SpaceError
from archsearch.objectives import axis_name, direction
from archsearch.recipes import baseline
from archsearch.space import SearchSpace
from archsearch.store import RunFolder, TrialRecord
from archsearch.study.journal import Journal

FIXED = {"task": "the task", "objectives": "the objectives"}


def extend(space: SearchSpace, folder: RunFolder, settings: dict[str, Any]) -> tuple[int, int]:
    """Rewrite the folder for `space`; returns how many trials stay and how many are outside.

    Raises RunError if task or objectives changed, since then no result compares. The caller holds the folder's lock.
    """
    before = folder.read_json("settings.json")
    for key, what in FIXED.items():
        if before[key] != json.loads(json.dumps(settings[key])):
            raise RunError(f"{what} changed: results would not compare. Give the space another name")
    records = folder.records()
    inside = [record for record in records if _is_inside(space, record)]
    kept = {record.trial for record in inside}
    outside = [record for record in records if record.trial not in kept]
    old = folder.path / "study.journal"
    old.unlink(missing_ok=True)
    goals = space.objectives
    axes = [axis_name(goal, goals) for goal in goals]
    journal = Journal(old, [direction(goal) for goal in goals], space.search, [rule.text for rule in space.rules])
    for record in inside:
        if record.name is None and record.status == "complete":
            with journal.add(
                record.trial, FixedChooser(record.holes), [record.objectives[a].value for a in axes]
            ) as chooser:
                space.sample(chooser)
    folder.replace_records(inside, outside)
    folder.write_text("space.yaml", space.source.text)
    folder.write_json("space.json", space.tree)
    folder.write_json("settings.json", settings)
    return len(inside), len(outside)


def _is_inside(space: SearchSpace, record: TrialRecord) -> bool:
    if record.repeat_of is not None:
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
