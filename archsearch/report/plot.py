"""Where everything of the front's scatter goes, in pixels: drawn as SVG in report.html, by matplotlib in front.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from archsearch.notation import COUNTED, log_ticks, tick_label, ticks
from archsearch.report.front import Axis, Front, Point

Role = Literal["front", "baseline", "near", "dominated"]
LOG_UNITS = ("ms", "bytes", *COUNTED)
LETTER = 7.3  # width of an average character at the label size, pixels
LINE = 13.0  # height of a label


@dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(x) if self.is_log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (v - low) / (high - low)


@dataclass(frozen=True)
class Mark:
    """A point at (x, y) with its error bars; `label` stands at (label_x, label_y), its left end on the baseline."""

    point: Point
    role: Role
    x: float
    y: float
    x_bar: tuple[float, float] | None
    y_bar: tuple[float, float] | None
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0


@dataclass(frozen=True)
class Plot:
    """A laid-out scatter. `stairs` bounds what the front dominates, `ties` joins points that noise cannot part."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_axis: Axis
    y_axis: Axis
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]
    stairs: tuple[tuple[float, float], ...]
    worst_corner: tuple[float, float]
    ties: tuple[tuple[float, float, float, float], ...]


def make_plot(front: Front, x_axis: Axis, y_axis: Axis, width: float, height: float) -> Plot:
    """Lay the points of a front out on two of its axes. The front must have points."""
    left, right, top, bottom = 56.0, width - 18.0, 34.0, height - 46.0
    x_scale = _scale(front.points, x_axis, left, right)
    y_scale = _scale(front.points, y_axis, bottom, top)
    marks = [_mark(p, x_axis, y_axis, x_scale, y_scale) for p in front.points]
    marks.sort(key=lambda m: ("dominated", "near", "baseline", "front").index(m.role))
    worst = (right if x_axis.goal == "min" else left, top if y_axis.goal == "min" else bottom)
    stairs = _stairs(front, x_axis, y_axis, x_scale, y_scale, worst)
    return Plot(
        width, height, left, right, top, bottom, x_axis, y_axis,
        x_ticks=_ticks(x_scale, x_axis.unit),
        y_ticks=_ticks(y_scale, y_axis.unit),
        marks=tuple(_with_labels(marks, stairs, left, right, top, bottom)),
        stairs=stairs,
        worst_corner=worst,
        ties=_ties(marks),
    )  # fmt: skip


def _scale(points: Sequence[Point], axis: Axis, start: float, end: float) -> Scale:
    values = [p.record.objectives[axis.name].value for p in points]
    is_log = axis.unit in LOG_UNITS and min(values) > 0 and max(values) > 10 * min(values)
    if is_log:
        margin = (max(values) / min(values)) ** 0.06
        return Scale(min(values) / margin, max(values) * margin, start, end, True)
    ends = [value + side * p.sigma[axis.name] for p, value in zip(points, values, strict=True) for side in (-1, 1)]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - margin, high + margin, start, end, False)


def _ticks(scale: Scale, unit: str) -> tuple[tuple[float, str], ...]:
    about = max(2, round(abs(scale.end - scale.start) / 90))
    found = log_ticks(scale.low, scale.high, unit) if scale.is_log else ticks(scale.low, scale.high, about, unit)
    return tuple((scale(value), tick_label(value, unit)) for value in found)


def _mark(point: Point, x_axis: Axis, y_axis: Axis, x_scale: Scale, y_scale: Scale) -> Mark:
    def bar(axis: Axis, scale: Scale) -> tuple[float, float] | None:
        value, sigma = point.record.objectives[axis.name].value, point.sigma[axis.name]
        if not sigma:
            return None
        low = max(value - sigma, scale.low)  # a bar that leaves the plot, or falls below a log axis, is cut
        return scale(low), scale(min(value + sigma, scale.high))

    role: Role = "dominated"
    if point.is_baseline:
        role = "baseline"
    elif point.on_front:
        role = "front"
    elif point.is_near:
        role = "near"
    return Mark(
        point,
        role,
        x_scale(point.record.objectives[x_axis.name].value),
        y_scale(point.record.objectives[y_axis.name].value),
        bar(x_axis, x_scale),
        bar(y_axis, y_scale),
        label=point.label if role in ("front", "baseline") else "",
    )


def _stairs(
    front: Front, x_axis: Axis, y_axis: Axis, x_scale: Scale, y_scale: Scale, worst: tuple[float, float]
) -> tuple[tuple[float, float], ...]:
    """The edge of the dominated region; on two of more axes there is no such edge to draw."""
    if {x_axis.name, y_axis.name} != {axis.name for axis in front.axes}:
        return ()
    corners = {
        (x_scale(p.record.objectives[x_axis.name].value), y_scale(p.record.objectives[y_axis.name].value))
        for p in front.members
    }
    steps: list[tuple[float, float]] = []
    last_y = worst[1]
    for x, y in sorted(corners, reverse=x_axis.goal == "max"):  # from the best x to the worst
        steps += [(x, last_y), (x, y)]
        last_y = y
    return (*steps, (worst[0], last_y))


def _ties(marks: Sequence[Mark]) -> tuple[tuple[float, float, float, float], ...]:
    places = {m.point.record.arch_id: m for m in marks if m.role != "dominated"}
    return tuple(
        (m.x, m.y, other.x, other.y)
        for m in places.values()
        for arch_id in m.point.tied_with
        if (other := places.get(arch_id)) is not None and m.point.record.trial < other.point.record.trial
    )


def _with_labels(
    marks: Sequence[Mark], stairs: Sequence[tuple[float, float]], left: float, right: float, top: float, bottom: float
) -> list[Mark]:
    """Each label where it covers least: beside its point, or a little further out; first come, first served."""
    taken = [
        (min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1, 0.5)
        for (x1, y1), (x2, y2) in pairwise(stairs)
    ]
    taken += [(m.x - 7, m.y - 7, m.x + 7, m.y + 7, 1.0 if m.role in ("front", "baseline") else 0.3) for m in marks]
    placed = []
    for mark in marks:
        if not mark.label:
            placed.append(mark)
            continue
        wide = LETTER * len(mark.label) + 2
        close = [
            t for t in taken if t[0] < mark.x + wide + 30 and t[2] > mark.x - wide - 30 and abs(t[1] - mark.y) < 60
        ]
        best, cost = (mark.x, mark.y), math.inf
        for reach in (10.0, 18.0):
            spots = (
                (mark.x + reach - 1, mark.y - 4),
                (mark.x - wide / 2, mark.y - reach),
                (mark.x - wide / 2, mark.y + reach + LINE - 4),
                (mark.x - reach + 1 - wide, mark.y - 4),
                (mark.x + reach - 1, mark.y + 5),
                (mark.x - reach + 1 - wide, mark.y + 5),
                (mark.x + 0.7 * reach, mark.y - reach),
                (mark.x + 0.7 * reach, mark.y + reach + LINE - 4),
                (mark.x - 0.7 * reach - wide, mark.y - reach),
                (mark.x - 0.7 * reach - wide, mark.y + reach + LINE - 4),
            )
            for k, (x, y) in enumerate(spots):
                box = (x, y - LINE + 3, x + wide, y + 2)
                outside = box[0] < left + 2 or box[2] > right or box[1] < top or box[3] > bottom - 2
                covered = sum(weight * _overlap(box, other[:4]) for *other, weight in close)
                here = covered + 1000.0 * outside + 0.3 * k + 0.4 * (reach - 10)
                if here < cost:
                    best, cost = (x, y), here
        taken.append((best[0], best[1] - LINE + 3, best[0] + wide, best[1] + 2, 2.0))
        placed.append(replace(mark, label_x=best[0], label_y=best[1]))
    return placed


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Shared area of two boxes."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
