"""Draws a model: one line, a table of blocks, or an SVG. Reads the graph; makes no tensor."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from archsearch.architecture import ModelSpec
from archsearch.cost import block_costs
from archsearch.graph import build_graph
from archsearch.notation import in_bytes, run_length, si

if TYPE_CHECKING:
    import networkx as nx


def one_line(model: ModelSpec) -> str:
    """Mixers, then FFNs, as folded lists."""
    mixers = run_length([block.mixer_name or block.mixer.kind for block in model.blocks])
    return f"{mixers} | {run_length([block.ffn_name or block.ffn.kind for block in model.blocks])}"


def table(model: ModelSpec) -> str:
    """One row per block: mixer, ffn, parameters, state, edges across depth."""
    rows = [("block", "mixer", "ffn", "params", f"state at {model.context:,}", "edges")]
    for i, (block, costs) in enumerate(zip(model.blocks, block_costs(model), strict=True)):
        edges = [f"kv of {block.kv_from}"] if block.kv_from is not None else []
        for what, source in (("mixer", block.mixer_weights_from), ("ffn", block.ffn_weights_from)):
            edges += [f"{what} weights of {source}"] if source is not None else []
        rows.append(
            (
                str(i),
                _label(block.mixer_name, block.mixer.kind),
                _label(block.ffn_name, block.ffn.kind),
                si(costs.params),
                in_bytes(costs.state_bytes),
                ", ".join(edges),
            )
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _label(name: str, kind: str) -> str:
    return kind if name in ("", kind) else f"{name} ({kind})"


CELL_W, CELL_H, GAP, LEFT = 190, 26, 8, 96


def svg(model: ModelSpec, title: str = "") -> str:
    """The layer graph from the embedding (bottom) to the head (top); arcs are cross-depth edges."""
    graph = build_graph(model)
    order = [node for node in graph if graph.nodes[node]["role"] in ("embed", "mixer", "ffn", "norm", "head")]
    height = len(order) * (CELL_H + GAP) + 60
    y = {node: height - 30 - (at + 1) * (CELL_H + GAP) for at, node in enumerate(order)}
    width = LEFT + CELL_W + 150
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title or one_line(model))}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-weight="600">{escape(title)}</text>',
    ]
    x = LEFT + CELL_W / 2
    for first, second in pairwise(order):
        parts.append(f'<line x1="{x}" y1="{y[first]}" x2="{x}" y2="{y[second] + CELL_H}" stroke="#9aa3ad"/>')
    for node in order:
        parts.append(_cell(graph, node, y[node]))
    for source, target, attributes in graph.edges(data=True):
        if attributes["kind"] != "residual":
            parts.append(_arc(y[source] + CELL_H / 2, y[target] + CELL_H / 2, attributes["kind"]))
    return "\n".join([*parts, "</svg>"])


FILLS = {"mixer": "#cfe3f5", "ffn": "#fde4c3", "embed": "#e8eaed", "norm": "#e8eaed", "head": "#e8eaed"}
STROKES = {"kv": "#0072b2", "weights": "#b5508a"}


def _cell(graph: nx.DiGraph[str], node: str, y: float) -> str:
    attributes = graph.nodes[node]
    role = attributes["role"]
    kind = attributes["spec"].kind if "spec" in attributes else role
    names = attributes.get("name")
    label = _label(names, kind) if names else kind
    numbered = role == "mixer" or (role == "ffn" and attributes["alone"])
    at = f'x="{LEFT - 10}" y="{y + 17}" text-anchor="end"'
    number = f'<text {at} fill="#6b7280">{attributes["block"]}</text>' if numbered else ""
    return (
        f'<rect x="{LEFT}" y="{y}" width="{CELL_W}" height="{CELL_H}" rx="5" fill="{FILLS[role]}" stroke="#9aa3ad"/>'
        f'<text x="{LEFT + CELL_W / 2}" y="{y + 17}" text-anchor="middle">{escape(label)}</text>'
        f"{number}"
    )


def _arc(y1: float, y2: float, kind: str) -> str:
    x = LEFT + CELL_W
    bend = x + min(120, 24 + abs(y1 - y2) / 6)
    dashes = ' stroke-dasharray="4 3"' if kind == "weights" else ""
    path = f"M{x} {y1} C {bend} {y1}, {bend} {y2}, {x} {y2}"
    return f'<path d="{path}" fill="none" stroke="{STROKES[kind]}" stroke-width="1.5"{dashes}/>'
