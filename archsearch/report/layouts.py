"""The layouts on the front and of the baselines: layer strips at both scales, their legend, and how to export them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from archsearch.notation import in_bytes, si
from archsearch.report import palette
from archsearch.report.blocks import BlockView, describe, headline, letters, read_blocks
from archsearch.report.front import Front, Point
from archsearch.report.markup import Markup, join, tag
from archsearch.report.picks import written
from archsearch.report.strips import (
    FFN_HEIGHT,
    MIXER_HEIGHT,
    Cell,
    cell_svg,
    ffn_cell,
    make_strip,
    mixer_cells,
    strip_svg,
)


def shown(front: Front) -> list[Point]:
    """Whose layouts are drawn: the front by number, then the baselines that are not on it."""
    return [*front.members, *(b for b in front.baselines if not b.on_front)]


def layouts(front: Front, run: str) -> Markup:
    """The section's content: legend, then one article for each of `shown`."""
    points = shown(front)
    blocks = [b for p in points for model in p.record.architecture.values() for b in read_blocks(model)]
    marks = letters([b.mixer_name for b in blocks if b.mixer != "none"])
    parts = [_legend(blocks, marks)]
    for point in points:
        if not point.on_front and (point is points[0] or points[points.index(point) - 1].on_front):
            parts.append(tag("h3", "Baselines that are not on the front"))
        parts.append(_layout(point, front, marks, run))
    return join(parts)


def _layout(point: Point, front: Front, marks: dict[str, str], run: str) -> Markup:
    r = point.record
    words = headline(r.architecture)
    values = [tag("span", tag("b", point.show(axis)), f" {axis.name}") for axis in front.axes]
    chance = f"on the front with probability {point.probability:.2f}" if point.probability is not None else None
    return tag(
        "article",
        tag(
            "header",
            tag(
                "span",
                badge(point),
                tag("b", r.name or words),
                tag("span", f" {words}", class_="quiet") if r.name else None,
            ),
            tag("span", *values, class_="values"),
        ),
        *(_strip(scale, model, marks) for scale, model in r.architecture.items()),
        tag(
            "footer",
            tag("code", r.arch_id, class_="all"),
            *(tag("span", text) for text in (*_sizes(r.metrics), chance) if text),
            tag("span", _ties(point, front)) if point.tied_with else None,
        ),
        tag(
            "details",
            tag("summary", "Layout in words, choices, export"),
            tag("p", "; ".join(f"{scale}: {describe(model)}" for scale, model in r.architecture.items())),
            tag("pre", "\n".join(written(r.holes))) if r.holes else None,
            tag("p", tag("code", export_command(run, r.arch_id), class_="all")),
        ),
        class_="layout",
        id=f"t{r.trial}",
        data_trial=r.trial,
    )


def badge(point: Point) -> Markup:
    """The number on the front, or a baseline's diamond."""
    return tag("span", point.number or "◆", class_="badge" if point.on_front else "badge baseline")


def export_command(run: str, arch_id: str) -> str:
    """What to type to get an architecture as model code."""
    return f"archsearch export {shlex.quote(run)} --pick {shlex.quote(arch_id)} -o DIR"


def _sizes(metrics: Mapping[str, float]) -> list[str]:
    shows = (
        ("params_target", si, "parameters"),
        ("active_params_target", si, "active"),
        ("state_bytes_target", in_bytes, "state"),
        ("flops_per_token_target", si, "FLOPs/token"),
    )
    return [f"{show(metrics[key])} {word}" for key, show, word in shows if key in metrics]


def _ties(point: Point, front: Front) -> str:
    names = {p.record.arch_id: p.label for p in front.points}
    return "within noise of " + ", ".join(names[arch_id] for arch_id in dict.fromkeys(point.tied_with))


def _strip(scale: str, model: Mapping[str, Any], marks: dict[str, str]) -> Markup:
    blocks = read_blocks(model)
    label = f"{scale}: {describe(model)}"
    width = model.get("d_model")
    return tag(
        "div",
        tag("span", tag("b", scale), Markup(" <br>"), f"{len(blocks)} blocks, d {width}", class_="quiet"),
        tag("div", strip_svg(make_strip(blocks, marks), label), class_="cells") if blocks else None,
        class_="strip",
    )


def _legend(blocks: Sequence[BlockView], marks: dict[str, str]) -> Markup:
    mixers = {b.mixer_name: b for b in blocks}
    ffns = {b.ffn_name: b for b in blocks}
    upper = [
        _key(_mixer_swatch(block, marks.get(name, "")), name, " + ".join(block.branches))
        for name, block in mixers.items()
    ]
    lower = [_key(_ffn_swatch(block), name, block.ffn) for name, block in ffns.items()]
    return join(
        [
            tag("ul", tag("li", "upper row, mixers:"), *upper, class_="key"),
            tag("ul", tag("li", "lower row, FFNs:"), *lower, *_sharing(blocks), class_="key"),
        ]
    )


def _sharing(blocks: Sequence[BlockView]) -> list[Markup]:
    found = []
    if any(b.kv_from is not None for b in blocks):
        found.append(_key(_bracket_swatch("kv"), "bracket above", "keys and values reused"))
    if any(b.mixer_weights_from is not None or b.ffn_weights_from is not None for b in blocks):
        found.append(_key(_bracket_swatch("weights"), "bracket below", "weights shared"))
    return found


def _key(swatch: Markup, name: str, what: str) -> Markup:
    return tag("li", swatch, tag("span", tag("b", name), f" {what}" if what != name else None))


def _mixer_swatch(block: BlockView, letter: str) -> Markup:
    cells = mixer_cells(block.branches)
    placed = [tuple((20 * x, MIXER_HEIGHT * y) for x, y in cell.corners) for cell in cells]
    shapes = [cell_svg(Cell(corners, c.colour, c.hatched)) for corners, c in zip(placed, cells, strict=True)]
    colour = palette.mixer_colour(block.branches[0])
    is_even = len(block.branches) == 1 and palette.is_known(block.mixer)
    ink = palette.ink_on(colour) if colour and is_even else None
    text = tag("text", letter, x=10, y=15, fill=ink, class_="letter" if ink else "letter over") if letter else None
    return tag("svg", *shapes, text, width=20, height=MIXER_HEIGHT, aria_hidden="true", class_="swatch")


def _ffn_swatch(block: BlockView) -> Markup:
    square = ((0.0, 0.0), (20.0, 0.0), (20.0, FFN_HEIGHT), (0.0, FFN_HEIGHT))
    cell = cell_svg(ffn_cell(block.ffn, square))
    dots = tag("path", d="M5 4.5h0M10 4.5h0M15 4.5h0", class_="experts") if block.is_moe else None
    return tag("svg", cell, dots, width=20, height=FFN_HEIGHT, aria_hidden="true", class_="swatch")


def _bracket_swatch(what: str) -> Markup:
    line = tag("path", d="M3 8V3H17V8" if what == "kv" else "M3 2V7H17V2", class_=f"bracket {what}")
    root = tag("path", d="M3 7h0" if what == "kv" else "M3 3h0", class_="root")
    return tag("svg", line, root, width=20, height=10, aria_hidden="true")
