"""The front's scatter as inline SVG: colours come from the page's style, so that it follows light and dark."""

from __future__ import annotations

from archsearch.report.blocks import headline
from archsearch.report.markup import Markup, join, tag
from archsearch.report.plot import Mark, Plot

CROWD = 400


def scatter(plot: Plot, class_: str = "") -> Markup:
    """An SVG of the plot. Points link to their layouts and carry their numbers as a title."""
    return tag(
        "svg",
        tag("title", f"{plot.y_axis.name} against {plot.x_axis.name}"),
        _grid(plot),
        _dominated(plot),
        *(tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="tie") for x1, y1, x2, y2 in plot.ties),
        *(_bars(mark) for mark in plot.marks if mark.role != "dominated" or len(plot.marks) <= CROWD),
        *_points(plot),
        *(
            tag("text", mark.label, x=mark.label_x, y=mark.label_y, class_=f"label {mark.role}")
            for mark in plot.marks
            if mark.label
        ),
        viewBox=f"0 0 {plot.width:g} {plot.height:g}",
        role="img",
        class_=f"scatter {class_}".strip(),
    )


def _grid(plot: Plot) -> Markup:
    parts = []
    for x, label in plot.x_ticks:
        parts.append(tag("line", x1=x, x2=x, y1=plot.top, y2=plot.bottom, class_="grid"))
        parts.append(tag("text", label, x=x, y=plot.bottom + 17, class_="tick", text_anchor="middle"))
    for y, label in plot.y_ticks:
        parts.append(tag("line", x1=plot.left, x2=plot.right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", label, x=plot.left - 8, y=y + 4, class_="tick", text_anchor="end"))
    parts.append(tag("text", axis_title(plot, "x"), x=plot.right, y=plot.bottom + 38, class_="axis", text_anchor="end"))
    parts.append(tag("text", axis_title(plot, "y"), x=4, y=18, class_="axis"))
    return tag("g", *parts)


def axis_title(plot: Plot, which: str) -> str:
    """The axis' name and unit with an arrow to the better side."""
    axis = plot.x_axis if which == "x" else plot.y_axis
    unit = f" ({axis.unit})" if axis.unit else ""
    if which == "x":
        return f"← better   {axis.name}{unit}" if axis.goal == "min" else f"{axis.name}{unit}   better →"
    return f"{axis.name}{unit}   {'↓' if axis.goal == 'min' else '↑'} better"


def _dominated(plot: Plot) -> Markup | None:
    if not plot.stairs:
        return None
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in plot.stairs)
    corner = f"{plot.worst_corner[0]:.1f},{plot.worst_corner[1]:.1f}"
    return join(
        [
            tag("polygon", points=f"{line} {corner}", class_="dominated-area"),
            tag("polyline", points=line, class_="stairs"),
        ]
    )


def _bars(mark: Mark) -> Markup | None:
    bars = []
    if mark.x_bar:
        bars.append(tag("line", x1=mark.x_bar[0], x2=mark.x_bar[1], y1=mark.y, y2=mark.y))
    if mark.y_bar:
        bars.append(tag("line", x1=mark.x, x2=mark.x, y1=mark.y_bar[0], y2=mark.y_bar[1]))
    return tag("g", *bars, class_=f"bars {mark.role}") if bars else None


def _points(plot: Plot) -> list[Markup]:
    """All points; a crowd of dominated ones becomes one path without hover, so that big studies stay light."""
    crowd = [mark for mark in plot.marks if mark.role == "dominated"]
    rest = plot.marks[len(crowd) :] if len(crowd) > CROWD else plot.marks
    dots = "".join(f"M{mark.x:.1f} {mark.y:.1f}h0" for mark in crowd) if len(crowd) > CROWD else None
    return [*([tag("path", d=dots, class_="dots")] if dots else []), *(_point(mark, plot) for mark in rest)]


def _point(mark: Mark, plot: Plot) -> Markup:
    role = f"point {mark.role}{' on-front' if mark.point.on_front else ''}"
    if mark.role == "baseline":
        r = 6.5
        diamond = ((0, -r), (r, 0), (0, r), (-r, 0))
        corners = " ".join(f"{mark.x + dx:.1f},{mark.y + dy:.1f}" for dx, dy in diamond)
        shape = tag("polygon", tag("title", hover_text(mark, plot)), points=corners, class_=role)
    else:
        radius = {"front": 6.0, "near": 4.5}.get(mark.role, 3.5)
        shape = tag("circle", tag("title", hover_text(mark, plot)), cx=mark.x, cy=mark.y, r=radius, class_=role)
    if mark.role in ("front", "baseline"):
        return tag("a", shape, href=f"#t{mark.point.record.trial}", data_trial=mark.point.record.trial)
    return tag("g", shape, data_trial=mark.point.record.trial)


def hover_text(mark: Mark, plot: Plot) -> str:
    """What a point says when pointed at."""
    point = mark.point
    name = point.label if point.is_baseline or not point.on_front else f"front point {point.number}"
    lines = [f"{name} · {point.record.arch_id}", headline(point.record.architecture)]
    lines += [f"{axis.name} {point.show(axis)}" for axis in (plot.y_axis, plot.x_axis)]
    if point.probability is not None:
        lines.append(f"on the front with probability {point.probability:.2f}")
    return "\n".join(lines)
