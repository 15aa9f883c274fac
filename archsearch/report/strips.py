"""Layer strips: a layout as a row of cells, mixer above and FFN below, brackets for what is shared across depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Literal

from archsearch.report import palette
from archsearch.report.blocks import BlockView
from archsearch.report.markup import Markup, tag

Corner = tuple[float, float]
MIXER_HEIGHT, FFN_HEIGHT, GAP, LANE = 22.0, 9.0, 2.0, 7.0


@dataclass(frozen=True)
class Cell:
    """A filled polygon; x runs in blocks, y in pixels. colour None: nothing stands there. hatched: a kind not ours."""

    corners: tuple[Corner, ...]
    colour: str | None
    hatched: bool = False


@dataclass(frozen=True)
class Bracket:
    """Blocks that use the keys and values (above) or the weights (below) of `source`."""

    what: Literal["kv", "weights"]
    source: int
    readers: tuple[int, ...]
    lane: int


@dataclass(frozen=True)
class Strip:
    """A strip's geometry: cells, three dots for every mixture of experts, brackets, letters."""

    n_blocks: int
    height: float
    top: float  # of the mixers' row
    cells: tuple[Cell, ...]
    dots: tuple[Corner, ...]
    brackets: tuple[Bracket, ...]
    letters: tuple[tuple[float, str, str | None], ...]  # x, letter, ink (None: over several colours or a hatching)

    @property
    def bottom(self) -> float:
        """The FFN row's lower edge."""
        return self.top + MIXER_HEIGHT + GAP + FFN_HEIGHT


def make_strip(blocks: Sequence[BlockView], letters: dict[str, str]) -> Strip:
    """Lay a layout out."""
    brackets = _brackets(blocks)
    above = 1 + max((b.lane for b in brackets if b.what == "kv"), default=-1)
    below = 1 + max((b.lane for b in brackets if b.what == "weights"), default=-1)
    top = 1 + LANE * above + (2 if above else 0)
    ffn_top = top + MIXER_HEIGHT + GAP
    cells, dots, marks = [], [], []
    for i, block in enumerate(blocks):
        for cell in mixer_cells(block.branches):
            moved = tuple((i + x, top + MIXER_HEIGHT * y) for x, y in cell.corners)
            cells.append(Cell(moved, cell.colour, cell.hatched))
        if (colour := palette.mixer_colour(block.branches[0])) is not None:
            is_even = len(block.branches) == 1 and palette.is_known(block.mixer)
            ink = palette.ink_on(colour) if is_even else None
            marks.append((i + 0.5, letters.get(block.mixer_name, ""), ink))
        square = ((i, ffn_top), (i + 1.0, ffn_top), (i + 1.0, ffn_top + FFN_HEIGHT), (i, ffn_top + FFN_HEIGHT))
        cells.append(ffn_cell(block.ffn, square))
        if block.is_moe:
            dots += [(i + x, ffn_top + FFN_HEIGHT / 2) for x in (0.25, 0.5, 0.75)]
    height = ffn_top + FFN_HEIGHT + 1 + LANE * below + (2 if below else 0)
    return Strip(len(blocks), height, top, tuple(cells), tuple(dots), tuple(brackets), tuple(marks))


def mixer_cells(kinds: Sequence[str]) -> list[Cell]:
    """A mixer, or the branches of a parallel one, filling the unit square."""
    parts = zip(kinds, diagonal_split(len(kinds)), strict=True)
    return [Cell(corners, palette.mixer_colour(kind), not palette.is_known(kind)) for kind, corners in parts]


def ffn_cell(kind: str, corners: tuple[Corner, ...]) -> Cell:
    """An FFN at the given place."""
    return Cell(corners, palette.ffn_colour(kind), not palette.is_known(kind))


def diagonal_split(n: int) -> list[tuple[Corner, ...]]:
    """The unit square cut into n parts of equal area by parallel diagonals, from the upper left to the lower right."""
    cuts = [0.0, *(sqrt(2 * k / n) if 2 * k <= n else 2 - sqrt(2 * (n - k) / n) for k in range(1, n)), 2.0]

    def edge(c: float) -> list[Corner]:  # where x + y = c enters (from above) and leaves the square
        return [(c, 0.0), (0.0, c)] if c <= 1 else [(1.0, c - 1), (c - 1, 1.0)]

    parts = []
    for low, high in pairwise(cuts):
        corners = [*edge(low), *([(0.0, 1.0)] if low < 1 < high else []), *reversed(edge(high))]
        corners += [(1.0, 0.0)] if low < 1 < high else []
        parts.append(tuple(dict.fromkeys(corners)))
    return parts


def _brackets(blocks: Sequence[BlockView]) -> list[Bracket]:
    found = []
    for what, edges in (
        ("kv", [b.kv_from for b in blocks]),
        ("weights", [b.mixer_weights_from if b.mixer_weights_from is not None else b.ffn_weights_from for b in blocks]),
    ):
        ends: list[int] = []  # last block of each lane
        for source in sorted({edge for edge in edges if edge is not None}):
            readers = tuple(i for i, edge in enumerate(edges) if edge == source)
            lane = next((k for k, end in enumerate(ends) if end < source), len(ends))
            ends[lane : lane + 1] = [max(readers)]
            found.append(Bracket("kv" if what == "kv" else "weights", source, readers, lane))
    return found


def strip_svg(strip: Strip, label: str) -> Markup:
    """The strip as SVG that fills its container's width at a fixed height.

    Shapes live in a coordinate system that is stretched sideways only, letters in one that is not.
    """
    n = strip.n_blocks
    shapes = tag(
        "svg",
        *(cell_svg(cell) for cell in strip.cells),
        tag("path", d="".join(f"M{x:.2f} {y:.1f}h0" for x, y in strip.dots), class_="experts") if strip.dots else None,
        *(_bracket(bracket, strip) for bracket in strip.brackets),
        viewBox=f"0 0 {n} {strip.height:g}",
        preserveAspectRatio="none",
        width="100%",
        height=strip.height,
    )
    letters = [
        tag(
            "text",
            letter,
            x=f"{100 * x / n:.3f}%",
            y=strip.top + 15,
            fill=ink,
            class_="letter" if ink else "letter over",
        )
        for x, letter, ink in strip.letters
    ]
    density = next((f"upto{limit}" for limit in (16, 32, 64) if n <= limit), "dense")
    return tag("svg", shapes, *letters, role="img", aria_label=label, width="100%", height=strip.height, class_=density)


def cell_svg(cell: Cell) -> Markup:
    """A cell as SVG, in its own coordinates."""
    points = " ".join(f"{x:.3g},{y:g}" if x < 1 else f"{x:.2f},{y:g}" for x, y in cell.corners)
    if cell.colour is None:
        return tag("polygon", points=points, class_="empty")
    filled = tag("polygon", points=points, fill=cell.colour)
    if not cell.hatched:
        return filled
    (x0, x1), (y0, y1) = _span(c[0] for c in cell.corners), _span(c[1] for c in cell.corners)
    lines = "".join(
        f"M{x0 + (x1 - x0) * a:.2f} {y1:g}L{x0 + (x1 - x0) * (a + 0.33):.2f} {y0:g}" for a in (0, 0.33, 0.66)
    )
    return tag("g", filled, tag("path", d=lines, class_="hatch"))


def _bracket(bracket: Bracket, strip: Strip) -> Markup:
    ends = (bracket.source, *bracket.readers)
    near = strip.top - 1 if bracket.what == "kv" else strip.bottom + 1
    away = -1 if bracket.what == "kv" else 1
    far = near + away * (LANE * (bracket.lane + 1) - 2)
    line = f"M{bracket.source + 0.5} {near:g}V{far:g}H{max(ends) + 0.5}"
    ticks = "".join(f"M{i + 0.5} {far:g}V{near:g}" for i in bracket.readers)
    root = tag("path", d=f"M{bracket.source + 0.5} {near + away * 2:g}h0", class_=f"root {bracket.what}")
    return tag("g", tag("path", d=line + ticks, class_=f"bracket {bracket.what}"), root)


def _span(values: Iterable[float]) -> tuple[float, float]:
    listed = list(values)
    return min(listed), max(listed)
