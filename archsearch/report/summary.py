"""The front as a plain text table, for terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from archsearch.notation import in_bytes, si
from archsearch.report.blocks import describe
from archsearch.report.front import Front, Point, build_front
from archsearch.store import TrialRecord


def summary(records: Sequence[TrialRecord], settings: Mapping[str, Any], width: int = 120) -> str:
    """The front and the baselines, one line each and at most `width` columns, under a line that counts the trials."""
    front = build_front(records, settings)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(front.n_trials.items())) or "no trials yet"
    if not front.points:
        return f"{_clean(front.study)}: {counts}; no front yet"
    members, others = front.members, [b for b in front.baselines if not b.on_front]
    header = ["", "arch_id", *(axis.name for axis in front.axes), "P(front)", "params", "state", "layout at target"]
    units = ["", "", *(axis.unit for axis in front.axes), "", "", "", ""]
    rows = [_row(point, front) for point in members]
    rest = [_row(point, front) for point in others]
    widths = [max(len(row[k]) for row in (header, units, *rows, *rest)) for k in range(len(header))]
    lines = [f"{_clean(front.study)}: {len(members)} on the front ({counts})", "", _line(header, widths, width)]
    lines += [_line(units, widths, width)] if any(units) else []
    lines += [_line(row, widths, width) for row in rows]
    if rest:
        lines += ["baselines not on the front:", *(_line(row, widths, width) for row in rest)]
    return "\n".join(lines)


def _row(point: Point, front: Front) -> list[str]:
    r = point.record
    label = " ".join(str(part) for part in (point.number, r.name) if part is not None)
    model: Mapping[str, Any] = r.architecture.get("target") or next(iter(r.architecture.values()), {})
    return [
        _clean(label),
        r.arch_id,
        *(axis.show(r.objectives[axis.name]) for axis in front.axes),
        "" if point.probability is None else f"{point.probability:.2f}",
        si(r.metrics["params_target"]) if "params_target" in r.metrics else "",
        in_bytes(r.metrics["state_bytes_target"]) if "state_bytes_target" in r.metrics else "",
        _clean(describe(model)),
    ]


def _line(cells: Sequence[str], widths: Sequence[int], width: int) -> str:
    """Cells in columns, text left and numbers right, cut at `width`; the last column takes what is left."""
    left = {0, 1, len(cells) - 1}
    padded = [
        cell.ljust(wide) if k in left else cell.rjust(wide)
        for k, (cell, wide) in enumerate(zip(cells, widths, strict=True))
        if wide
    ]
    text = "  ".join(padded).rstrip()
    return text if len(text) <= width else text[: width - 1] + "…"


def _clean(text: str) -> str:
    """Names come from files that others wrote: no escape sequences reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
