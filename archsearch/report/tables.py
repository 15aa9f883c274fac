"""The report's tables: the front beside the baselines, and what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from archsearch.notation import in_bytes, si
from archsearch.report.blocks import headline
from archsearch.report.front import Front, Point
from archsearch.report.layouts import badge, shown
from archsearch.report.markup import Markup, join, tag
from archsearch.store import TrialRecord

SIZES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("params_target", "params", si),
    ("active_params_target", "active", si),
    ("state_bytes_target", "state", in_bytes),
    ("flops_per_token_target", "FLOPs/token", si),
)


def front_table(front: Front) -> Markup:
    """One row for each drawn layout; sizes are at target scale."""
    sizes = [size for size in SIZES if any(size[0] in p.record.metrics for p in front.points)]
    has_chance = any(p.probability is not None for p in front.points)
    head = [tag("th", "architecture")]
    head += [tag("th", axis.name, tag("small", axis.unit)) for axis in front.axes]
    head += [tag("th", "P(front)")] if has_chance else []
    head += [tag("th", word, tag("small", "target")) for _, word, _ in sizes]
    rows = [_row(point, front, has_chance, [(key, show) for key, _, show in sizes]) for point in shown(front)]
    return tag("div", tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows)), class_="scroll")


def _row(point: Point, front: Front, has_chance: bool, sizes: Sequence[tuple[str, Callable[[float], str]]]) -> Markup:
    r = point.record
    words = headline(r.architecture)
    name = r.name or (words if len(words) <= 28 else words[:27] + "…")
    link = tag("span", tag("a", name, href=f"#t{r.trial}"), tag("code", r.arch_id, class_="all"))
    cells = [tag("td", tag("div", badge(point), link, class_="name"))]
    cells += [tag("td", point.show(axis)) for axis in front.axes]
    cells += [tag("td", f"{point.probability:.2f}" if point.probability is not None else "")] if has_chance else []
    cells += [tag("td", show(r.metrics[key]) if key in r.metrics else "") for key, show in sizes]
    return tag("tr", *cells, data_trial=r.trial, class_="baseline" if point.is_baseline else None)


def failure_table(records: Sequence[TrialRecord]) -> Markup:
    """Infeasible trials with their reasons; a traceback opens on a click."""
    failed = [r for r in records if r.status == "infeasible"]
    if not failed:
        return tag("p", "None.", class_="quiet")
    counts = ", ".join(f"{reason} {n}" for reason, n in Counter(r.reason for r in failed).most_common())
    head = tag("tr", tag("th", "trial"), tag("th", "reason", class_="text"), tag("th", "what happened", class_="text"))
    rows = [
        tag(
            "tr",
            tag("td", r.trial, f" ({r.name})" if r.name else None),
            tag("td", r.reason, class_="text"),
            tag("td", r.message or "", _traceback(r), class_="wrap"),
        )
        for r in failed
    ]
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    return join([tag("p", f"{len(failed)} trials: {counts}.", class_="quiet"), tag("div", table, class_="scroll")])


def _traceback(record: TrialRecord) -> Markup | None:
    if not record.traceback:
        return None
    return tag("details", tag("summary", "traceback"), tag("pre", record.traceback))
