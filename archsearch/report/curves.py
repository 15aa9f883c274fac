"""How trials learned and how the search went, as small SVG panels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from archsearch.notation import quantity, si, tick_label, ticks
from archsearch.report.front import Front, Point, progress
from archsearch.report.markup import Markup, join, tag
from archsearch.report.plot import Scale
from archsearch.store import TrialRecord

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 220.0, 128.0, 30.0, 214.0, 8.0, 108.0
SHOWN = 0.02  # curves start after this fraction of the tokens: before it every loss is that of a fresh model


def learning_curves(front: Front, at_most: int = 24) -> Markup:
    """Training loss over tokens: one panel for each front point and baseline, all other trials in grey behind it."""
    drawn = [p for p in front.points if _curve(p.record)]
    chosen = [p for p in [*front.members, *(b for b in front.baselines if not b.on_front)] if p in drawn][:at_most]
    if not chosen:
        return tag("p", "No training curve was recorded.", class_="quiet")
    curves = {p.record.trial: _curve(p.record) for p in drawn}
    everything = [point for curve in curves.values() for point in curve]
    x = Scale(min(t for t, _ in everything), max(t for t, _ in everything) * 1.001, LEFT, RIGHT, True)
    y = Scale(min(v for _, v in everything) * 0.99, max(v for _, v in everything) * 1.01, BOTTOM, TOP, True)
    behind = "".join(_path(_thin(curve, 40), x, y) for curve in curves.values())
    shared = tag("svg", tag("defs", tag("path", id="all-curves", d=behind)), width=0, height=0, aria_hidden="true")
    panels = [_panel(point, curves[point.record.trial], x, y) for point in chosen]
    return join([shared, tag("div", *panels, class_="panels")])


def _curve(record: TrialRecord) -> list[tuple[int, float]]:
    start = SHOWN * record.tokens
    return [(t, loss) for t, loss in record.curve if t > start and math.isfinite(loss) and loss > 0]


def _thin(curve: Sequence[tuple[int, float]], at_most: int) -> list[tuple[int, float]]:
    """Means of equal pieces."""
    size = math.ceil(len(curve) / at_most)
    pieces = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(sum(t for t, _ in piece) // len(piece), sum(v for _, v in piece) / len(piece)) for piece in pieces]


def _path(curve: Sequence[tuple[int, float]], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(t):.1f} {y(loss):.1f}" for t, loss in curve)


def _panel(point: Point, curve: Sequence[tuple[int, float]], x: Scale, y: Scale) -> Markup:
    parts = [
        tag("g", tag("line", x1=LEFT, x2=RIGHT, y1=y(v), y2=y(v), class_="grid"), _label(v, LEFT - 4, y(v) + 3, "end"))
        for v in ticks(y.low, y.high, 3)
    ]
    title = point.record.name or f"front point {point.number}"
    svg = tag(
        "svg",
        *parts,
        _label(si(x.low) + " tokens", LEFT, BOTTOM + 13, "start"),
        _label(si(x.high / 1.001), RIGHT, BOTTOM + 13, "end"),
        tag("use", href="#all-curves", class_="others"),
        tag("path", d=_path(curve, x, y), class_="curve baseline" if point.is_baseline else "curve"),
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=f"training loss of {title}",
    )
    held_out = point.record.metrics.get("val_loss")
    ended = f"held-out {held_out:.3f}" if held_out is not None else f"{curve[-1][1]:.3f}"
    return tag("figure", tag("figcaption", tag("b", title), tag("span", ended)), svg, data_trial=point.record.trial)


def _label(value: float | str, x: float, y: float, anchor: str) -> Markup:
    text = value if isinstance(value, str) else tick_label(value, "")
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_="tick small")


def search_progress(front: Front) -> Markup | None:
    """Hypervolume after each trial as a share of the final one; None with fewer than three points."""
    steps = progress(front)
    if len(steps) < 3 or front.hypervolume <= 0:
        return None
    width, height, left, right, top, bottom = 560.0, 150.0, 40.0, 548.0, 10.0, 118.0
    low = min(volume for _, volume in steps) / front.hypervolume
    x = Scale(steps[0][0], steps[-1][0], left, right, False)
    y = Scale(max(0.0, low - 0.05), 1.02, bottom, top, False)
    places = [(x(trial), y(volume / front.hypervolume)) for trial, volume in steps]
    line = f"M{places[0][0]:.1f} {places[0][1]:.1f}" + "".join(f"H{px:.1f}V{py:.1f}" for px, py in places[1:])
    grid = [
        tag(
            "g",
            tag("line", x1=left, x2=right, y1=y(v), y2=y(v), class_="grid"),
            _label(f"{v:.0%}", left - 5, y(v) + 3, "end"),
        )
        for v in ticks(y.low, 1.0, 3)
    ]
    dots = [
        tag(
            "circle",
            tag("title", f"trial {p.record.trial}: {p.label}"),
            cx=x(p.record.trial),
            cy=bottom + 6,
            r=2.5,
            class_="joined",
        )
        for p in front.members
    ]
    svg = tag(
        "svg",
        *grid,
        tag("path", d=line, class_="curve"),
        *dots,
        _label(f"trial {steps[0][0]}", left, bottom + 24, "start"),
        _label(f"{steps[-1][0]}", right, bottom + 24, "end"),
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label="hypervolume by trial",
    )
    share = quantity(front.hypervolume, "")
    reference = ", ".join(f"{axis.name} {quantity(front.reference[axis.name], axis.unit)}" for axis in front.axes)
    caption = (
        f"Hypervolume by trial, as a share of the final {share} (reference point: {reference}). "
        "Dots: when the front's points were found."
    )
    return tag("figure", svg, tag("figcaption", caption, class_="quiet"), class_="progress")
