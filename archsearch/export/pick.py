"""Which trial of a study is meant: the knee of the front, the best on one axis, a name, an arch_id or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from archsearch import pareto
from archsearch.errors import ExportError, did_you_mean, one_of
from archsearch.quantity import parse_bound
from archsearch.report.front import Front, build_front
from archsearch.store import TrialRecord


def pick(records: Sequence[TrialRecord], settings: Mapping[str, Any], how: str) -> TrialRecord:
    """The record that `how` names.

    `knee`: the best compromise on the front · `front:<number>`: a point as tables number them · `best:<objective>` ·
    `best:<objective>:<other>=<bound>`, the best whose other value is within the bound · a baseline's name · an arch_id
    or the beginning of one · a trial number. A number of digits only is a trial first, an arch_id second. `settings` is
    the run's settings.json. Raises ExportError with what there is instead.
    """
    if how == "knee" or how.startswith(("best:", "front:")):
        return _on_the_front(build_front(records, settings), how)
    found = _by_number(records, how) or _by_name(records, how) or _by_arch_id(records, how)
    if found is None:
        names = sorted({r.name for r in records if r.name})
        words = ["knee", "front:1", *(f"best:{goal['name']}" for goal in settings["objectives"])]
        named = [f"'{name}'" for name in names]  # a name may hold a comma: transformer, seed 1
        raise ExportError(
            f"nothing of this run is called {how!r}; expected {one_of([*words, *named])}, a trial number or an arch_id."
            f"{did_you_mean(how, [*words, *names, *(r.arch_id for r in records)])}"
        )
    if not found.architecture:
        raise ExportError(f"trial {found.trial} has no architecture: {found.message or 'it was refused by a rule'}")
    return found


def introduce(records: Sequence[TrialRecord], settings: Mapping[str, Any], record: TrialRecord) -> str:
    """What was picked, for people: `trial 11, point 2 of the front`, `trial 2, gemma3, not on the front`."""
    point = next((p for p in build_front(records, settings).points if p.record.trial == record.trial), None)
    place: str = "not on the front" if point is not None else record.status
    if point is not None and point.number is not None:
        place = f"point {point.number} of the front"
    return ", ".join(str(part) for part in (f"trial {record.trial}", record.name, place) if part is not None)


def _on_the_front(front: Front, how: str) -> TrialRecord:
    if not front.points:
        raise ExportError("no trial of this run is complete, so there is no front to pick from")
    costs = front.costs(front.points)
    if how == "knee":
        return front.points[pareto.knee(costs)].record
    if how.startswith("front:"):
        return _numbered(front, how.removeprefix("front:"))
    name, *bounds = how.removeprefix("best:").split(":")
    at = _axis(front, name)
    allowed = np.ones(len(front.points), dtype=bool)
    for bound in bounds:
        allowed &= _within(front, costs, bound)
    return front.points[int(np.where(allowed, costs[:, at], np.inf).argmin())].record


def _numbered(front: Front, number: str) -> TrialRecord:
    found = next((point for point in front.members if str(point.number) == number), None)
    if found is None:
        raise ExportError(f"front:{number} is no point of the front; expected front:1 to front:{len(front.members)}")
    return found.record


def _axis(front: Front, name: str) -> int:
    axes = [axis.name for axis in front.axes]
    if name not in axes:
        raise ExportError(f"{name!r} is no objective of this run; expected {one_of(axes)}.{did_you_mean(name, axes)}")
    return axes.index(name)


def _within(front: Front, costs: pareto.Floats, bound: str) -> pareto.Bools:
    """Which points are within `decode_ms=30` or, if more is better, at it or above; raises ExportError if none is."""
    name, _, text = bound.partition("=")
    at = _axis(front, name)
    axis = front.axes[at]
    try:
        limit = parse_bound(text.strip(), axis.unit)
    except ValueError as error:
        raise ExportError(f"{bound!r}: {str(error).replace('found', 'the bound is', 1)}") from None
    allowed: pareto.Bools = costs[:, at] <= (limit if axis.goal == "min" else -limit)
    if not allowed.any():
        best = front.points[int(costs[:, at].argmin())]
        raise ExportError(
            f"no point has {name} {'<=' if axis.goal == 'min' else '>='} {limit:.10g} {axis.unit}; the nearest is "
            f"trial {best.record.trial} with {best.show(axis)}"
        )
    return allowed


def _by_number(records: Sequence[TrialRecord], how: str) -> TrialRecord | None:
    if not (how.isascii() and how.isdigit()):
        return None
    return next((r for r in records if r.trial == int(how)), None)


def _by_name(records: Sequence[TrialRecord], how: str) -> TrialRecord | None:
    return _best([r for r in records if r.name == how])


def _by_arch_id(records: Sequence[TrialRecord], how: str) -> TrialRecord | None:
    if not how:
        return None
    found = [r for r in records if r.arch_id.startswith(how)]
    ids = sorted({r.arch_id for r in found})
    if len(ids) > 1:
        raise ExportError(f"{how!r} begins {len(ids)} arch_ids: {', '.join(ids[:5])}{', ...' if ids[5:] else ''}")
    return _best(found)


def _best(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Of several trials of one architecture the complete one that trained longest."""
    return max(records, key=lambda r: (r.status == "complete", r.tokens, -r.trial), default=None)
