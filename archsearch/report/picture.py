"""front.png: the scatter beside the front's layer strips, for a README. matplotlib without a display."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from archsearch.report.blocks import BlockView, read_blocks
from archsearch.report.front import Front
from archsearch.report.layouts import shown
from archsearch.report.plot import Mark, Plot, make_plot
from archsearch.report.scatter import axis_title
from archsearch.report.strips import Cell, Strip, ffn_cell, make_strip, mixer_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, STRIPS, HEIGHT = 560.0, 460.0, 500.0  # pixels at 100 dpi: the scatter, the strips beside it, both
ACCENT, INK, SOFT, DOT, GRID = "#0b57d0", "#16202c", "#5a6675", "#8b97a5", "#e6eaee"
AT_MOST = 11  # strips
POINT = 0.72  # points per pixel


def picture(front: Front, dpi: int = 200) -> bytes:
    """The front as PNG: its first two objectives, of at least two. The front must have points."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    y_axis, x_axis = front.axes[:2]
    with mpl.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"(Glyph|Matplotlib currently does not support)"
        )  # names in any script
        figure = Figure(figsize=((WIDTH + STRIPS) / 100, HEIGHT / 100), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, WIDTH + STRIPS)
        axes.set_ylim(HEIGHT, 0)
        axes.axis("off")
        _scatter(axes, make_plot(front, x_axis, y_axis, WIDTH, HEIGHT), len(front.axes))
        _strips(axes, front)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": "archsearch"})
    return out.getvalue()


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float = 12,
    colour: str = INK,
    align: str = "left",
    bold: bool = False,
) -> None:
    axes.text(
        x, y, text, fontsize=size * POINT, color=colour, ha=align, va="baseline", weight="bold" if bold else "normal"
    )  # fmt: skip


def _scatter(axes: Axes, plot: Plot, n_objectives: int) -> None:
    for x, label in plot.x_ticks:
        axes.plot((x, x), (plot.top, plot.bottom), color=GRID, lw=0.8, zorder=0)
        _text(axes, x, plot.bottom + 18, label, 11.5, SOFT, "center")
    for y, label in plot.y_ticks:
        axes.plot((plot.left, plot.right), (y, y), color=GRID, lw=0.8, zorder=0)
        _text(axes, plot.left - 8, y + 4, label, 11.5, SOFT, "right")
    _text(axes, plot.right, plot.bottom + 38, axis_title(plot, "x"), 12.5, align="right", bold=True)
    _text(axes, 6, 20, axis_title(plot, "y"), 12.5, bold=True)
    if n_objectives > 2:
        _text(axes, plot.right, 20, f"the front of {n_objectives} objectives, two of them drawn", 11.5, SOFT, "right")
    if plot.stairs:
        area = [*plot.stairs, plot.worst_corner]
        axes.fill([x for x, _ in area], [y for _, y in area], color=ACCENT, alpha=0.07, lw=0, zorder=1)
        axes.plot([x for x, _ in plot.stairs], [y for _, y in plot.stairs], color=ACCENT, lw=1.1, alpha=0.75, zorder=2)
    for x1, y1, x2, y2 in plot.ties:
        axes.plot((x1, x2), (y1, y2), color=ACCENT, alpha=0.22, lw=11 * POINT, solid_capstyle="round", zorder=2)
    for mark in plot.marks:
        _mark(axes, mark)


def _mark(axes: Axes, mark: Mark) -> None:
    colour = {"front": ACCENT, "near": ACCENT, "baseline": INK, "dominated": DOT}[mark.role]
    faint = 0.45 if mark.role == "dominated" else 1.0
    if mark.x_bar:
        axes.plot(mark.x_bar, (mark.y, mark.y), color=colour, lw=0.9, alpha=0.7 * faint, zorder=3)
    if mark.y_bar:
        axes.plot((mark.x, mark.x), mark.y_bar, color=colour, lw=0.9, alpha=0.7 * faint, zorder=3)
    axes.plot(
        (mark.x,),
        (mark.y,),
        marker="D" if mark.role == "baseline" else "o",
        ms={"front": 12, "near": 9, "baseline": 9.5, "dominated": 7}[mark.role] * POINT,
        mfc="white" if mark.role == "near" else colour,
        mec=ACCENT if mark.role == "near" or (mark.role == "baseline" and mark.point.on_front) else "white",
        mew=1.5 if mark.role == "near" or mark.point.on_front else 0.8,
        alpha=faint,
        zorder=5 if mark.role in ("front", "baseline") else 4,
    )
    if mark.label:
        _text(axes, mark.label_x, mark.label_y, mark.label, 12, colour, bold=True)


def _strips(axes: Axes, front: Front) -> None:
    """Target-scale strips down the right side; what does not fit is counted."""
    points = [p for p in shown(front) if p.record.architecture][:AT_MOST]
    models = [p.record.architecture.get("target") or next(iter(p.record.architecture.values())) for p in points]
    layouts = [read_blocks(model) for model in models]
    left, width = WIDTH + 106, STRIPS - 122
    _text(axes, WIDTH + 14, 20, "layouts, first block to last", 12.5, bold=True)
    entries = [*_mixers(layouts).items(), *_ffns(layouts).items()]
    lowest = HEIGHT - 22 - 19 * ((len(entries) + 2) // 3)
    pitch = min(58.0, (lowest - 46) / max(1, len(points)))
    legend_top = min(lowest, 60 + pitch * len(points))
    for k, (point, blocks) in enumerate(zip(points, layouts, strict=True)):
        strip = make_strip(blocks, {})
        squeeze = min(1.0, (pitch - 8) / strip.height)
        top = 38 + k * pitch
        middle = top + squeeze * (strip.top + strip.bottom) / 2 + 4
        _text(axes, left - 10, middle, point.label, 12, ACCENT if point.on_front else INK, "right", bold=True)
        _strip(axes, strip, left, top, width / max(1, strip.n_blocks), squeeze)
    for k, (name, cells) in enumerate(entries):
        x, y = WIDTH + 14 + (k % 3) * 148, legend_top + 19 * (k // 3)
        for cell in cells:
            _cell(axes, Cell(tuple((x + 14 * a, y + 12 * b) for a, b in cell.corners), cell.colour, cell.hatched))
        _text(axes, x + 20, y + 10.5, name if len(name) < 18 else name[:16] + "…", 11.5, SOFT)


def _mixers(layouts: Sequence[Sequence[BlockView]]) -> dict[str, list[Cell]]:
    """Names with their cells in the unit square; names of one colour go together."""
    names: dict[tuple[str, ...], dict[str, None]] = {}
    for block in (b for blocks in layouts for b in blocks if b.mixer != "none"):
        names.setdefault(block.branches, {})[block.mixer_name] = None
    return {", ".join(called): mixer_cells(kinds) for kinds, called in names.items()}


def _ffns(layouts: Sequence[Sequence[BlockView]]) -> dict[str, list[Cell]]:
    found = {b.ffn_name: b.ffn for blocks in layouts for b in blocks if b.ffn != "none"}
    return {name: [ffn_cell(kind, ((0.0, 0.3), (1.0, 0.3), (1.0, 0.9), (0.0, 0.9)))] for name, kind in found.items()}


def _strip(axes: Axes, strip: Strip, left: float, top: float, per_block: float, squeeze: float) -> None:
    def at(x: float, y: float) -> tuple[float, float]:
        return left + per_block * x, top + squeeze * y

    for cell in strip.cells:
        _cell(axes, Cell(tuple(at(x, y) for x, y in cell.corners), cell.colour, cell.hatched))
    if strip.dots:
        placed = [at(x, y) for x, y in strip.dots]
        axes.plot([x for x, _ in placed], [y for _, y in placed], ".", color="white", ms=1.6, mew=0, zorder=7)
    for bracket in strip.brackets:
        away = -1 if bracket.what == "kv" else 1
        near = strip.top - 1 if away < 0 else strip.bottom + 1
        far = near + away * (7 * (bracket.lane + 1) - 2)
        ends = [(bracket.source, far, max(bracket.readers), far)]
        ends += [(i, near, i, far) for i in (bracket.source, *bracket.readers)]
        for i, y, i_end, y_end in ends:
            (x1, y1), (x2, y2) = at(i + 0.5, y), at(i_end + 0.5, y_end)
            axes.plot((x1, x2), (y1, y2), color=SOFT, lw=0.8, ls="-" if away < 0 else (0, (3, 1.5)), zorder=6)


def _cell(axes: Axes, cell: Cell) -> None:
    from matplotlib.patches import Polygon

    axes.add_patch(
        Polygon(
            cell.corners,
            closed=True,
            facecolor=cell.colour or "none",
            edgecolor="white" if cell.colour else "#dde2e8",
            hatch="////" if cell.hatched else None,
            lw=0.7,
            zorder=6 if cell.colour else 5,
        )
    )
