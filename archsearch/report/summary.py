"""The front as a plain text table, for terminals."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from archsearch.notation import in_bytes, quantity, si, tick_label
from archsearch.report.blocks import describe
from archsearch.report.front import Axis, Front, Point, build_front
from archsearch.store import TrialRecord
from archsearch.store.record import NOISY

LAYOUT = 24  # columns that a layout wants beside its numbers
SPARED = ("state", "params", "trial", "arch_id", "P(front)")  # columns that go, in this order, where there is no room
MESSAGE = 300  # letters of one that a failed trial left


def summary(records: Sequence[TrialRecord], settings: Mapping[str, Any], width: int = 120) -> str:
    """The front and the baselines in at most `width` columns, under a line that counts the trials.

    Layouts are shown whatever the width; other columns go first. Below: what limits refused, what failed, and without a
    front, why there is none.
    """
    front = build_front(records, settings)
    counts = _counts(records) or "no trials yet"
    refused = _refused(records, front.axes)
    if not front.points:
        told = [*(f"  warning: {each}" for each in refused), *_others(records, bool(refused))]
        return "\n".join([f"{_clean(front.study)}: {counts}; no front yet", *told])
    members, others = front.members, [b for b in front.baselines if not b.on_front]
    shown = [*members, *others]
    columns = _columns(front)
    rows = [[_clean(show(point)) for _, _, show in columns] for point in shown]
    units = [unit for _, unit, _ in columns]
    table = _Table([[name for name, _, _ in columns], *([units] if any(units) else []), *rows], width)
    lines = [f"{_clean(front.study)}: {len(members)} on the front ({counts})", ""]
    n_head = len(table.rows) - len(shown)
    for k in range(len(table.rows)):
        if others and k == n_head + len(members):
            lines.append("baselines not on the front:")
        lines += table.lines(k)
    if any(point.record.objectives[axis.name].is_noisy for point in shown for axis in front.axes):
        lines += ["", *textwrap.wrap(f"noisy: the spread is more than {NOISY:.0%} of the value; measure again", width)]
    for each in refused:
        lines += ["", *textwrap.wrap(each, width)]
    failures = _failures(records)
    lines += [""] * bool(failures) + [line for each in failures for line in textwrap.wrap(each, width)]
    return "\n".join(lines)


def _counts(records: Sequence[TrialRecord]) -> str:
    """How many trials ended how: `12 complete, 3 duplicate, 1 failed, 4 refused`."""
    found = Counter(r.ended for r in records)
    return ", ".join(f"{n} {how}" for how, n in sorted(found.items()))


def _failures(records: Sequence[TrialRecord]) -> list[str]:
    """By reason: how many trials broke, which a layout should not do, and the last of them."""
    last = {r.reason: r for r in records if r.ended == "failed"}
    n = Counter(r.reason for r in records)
    return [
        _clean(f"{n[reason]} failed ({reason}), such as trial {r.trial}: {_short(r.message)}")
        for reason, r in last.items()
    ]


def _refused(records: Sequence[TrialRecord], axes: Sequence[Axis]) -> list[str]:
    """By limit: how many trials it refused, and the one that missed it by the least."""
    lines = []
    n_run = sum(r.status != "duplicate" and r.reason not in ("rule", "graph") for r in records)
    for axis in axes:
        if axis.limit is None:
            continue
        sign = 1.0 if axis.goal == "min" else -1.0
        seen = [r for r in records if r.reason == "limit" and axis.name in r.objectives]
        over = [r for r in seen if sign * r.objectives[axis.name].value > sign * axis.limit]
        if over:
            nearest = min(over, key=lambda r: sign * r.objectives[axis.name].value)
            unit = f" {axis.unit}" if axis.unit and axis.unit != "bytes" else ""
            bound = f"{axis.name} {'<=' if sign > 0 else '>='} {tick_label(axis.limit, axis.unit)}{unit}"
            best = nearest.objectives[axis.name]
            miss = quantity(best.value, axis.unit, best.spread) + unit + (", noisy" if best.is_noisy else "")
            lines.append(
                f"the limit {bound} refused {len(over)} of {n_run} trials; nearest: {miss} (trial {nearest.trial})"
            )
    return lines


def _short(message: str | None) -> str:
    return textwrap.shorten(message or "no message", MESSAGE, placeholder=" ...")


def _others(records: Sequence[TrialRecord], but_limits: bool) -> list[str]:
    """What else kept trials from the front: the last message of every reason."""
    reasons = Counter(r.reason for r in records if r.reason is not None)
    last = {r.reason: r.message for r in records}
    return [
        _clean(f"  {n} {reason}" + (f", such as: {last[reason]}" if last[reason] else ""))
        for reason, n in reasons.most_common()
        if reason != "limit" or not but_limits
    ]


Column = tuple[str, str, Callable[[Point], str]]  # name, unit, what a row has there


def _columns(front: Front) -> list[Column]:
    """What the table shows; no size that is an objective too, and no chances where no noise is known."""
    known = " ".join(axis.name for axis in front.axes)
    has_chance = any(point.probability is not None for point in front.points)
    return [
        ("", "", lambda point: " ".join(str(part) for part in (point.number, point.record.name) if part is not None)),
        ("arch_id", "", lambda point: point.record.arch_id),
        ("trial", "", lambda point: str(point.record.trial)),
        *((axis.name, axis.unit, partial(Point.show, axis=axis)) for axis in front.axes),
        *([("P(front)", "", _chance)] if has_chance else []),
        *([("params", "", partial(_size, metric="params_target", show=si))] if "params" not in known else []),
        *([("state", "", partial(_size, metric="state_bytes_target", show=in_bytes))] if "state" not in known else []),
        ("layout at target", "", _layout),
    ]


def _chance(point: Point) -> str:
    return "" if point.probability is None else f"{point.probability:.2f}"


def _size(point: Point, metric: str, show: Callable[[float], str]) -> str:
    return show(point.record.metrics[metric]) if metric in point.record.metrics else ""


def _layout(point: Point) -> str:
    architecture = point.record.architecture
    model: Mapping[str, Any] = architecture.get("target") or next(iter(architecture.values()), {})
    return describe(model)


class _Table:
    """Cells in columns, text left and numbers right. The last column, a layout, is wrapped and never cut."""

    def __init__(self, rows: list[list[str]], width: int) -> None:
        self.rows, self.width = rows, width
        longest = max(len(row[-1]) for row in rows)
        self.is_folded = not self._spare(min(longest, LAYOUT))
        if self.is_folded:
            self._spare(0)

    def _spare(self, wanted: int) -> bool:
        """Leave out as many columns as must be for `wanted` to be left of the width; False if it never is."""
        self.widths = [max(len(row[k]) for row in self.rows) for k in range(len(self.rows[0]))]
        for name in SPARED:
            if self._left < wanted and name in self.rows[0]:
                self.widths[self.rows[0].index(name)] = 0
        return self._left >= wanted

    @property
    def _left(self) -> int:
        """Columns that the numbers leave to the layout."""
        return self.width - sum(wide + 2 for wide in self.widths[:-1] if wide)

    def lines(self, k: int) -> list[str]:
        """Row number `k`, the layout beside its numbers or, where these leave too little, below them."""
        *cells, layout = self.rows[k]
        numbers = "".join(
            (cell.ljust(wide) if at < 2 else cell.rjust(wide)) + "  "
            for at, (cell, wide) in enumerate(zip(cells, self.widths, strict=False))
            if wide
        )
        if self.is_folded:
            line = numbers.rstrip()
            line = line if len(line) <= self.width else line[: self.width - 1] + "…"
            return [line, *textwrap.wrap(layout, self.width, initial_indent="    ", subsequent_indent="    ")]
        first, *rest = textwrap.wrap(layout, self._left) or [""]
        return [(numbers + first).rstrip(), *(" " * len(numbers) + more for more in rest)]


def _clean(text: str) -> str:
    """Names come from files that others wrote: no escape sequences reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
