"""The table of results: a line for the terminal, and kernels/README.md from the files in results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    ours = row["ours"]
    text = f"{row['op'] + ' ' + row['shape']:58s} {numbers(ours)}  floor {floor(row):.3f}"
    for name, peer in row["peers"].items():
        text += f"  | {name} {numbers(peer)}"
    if (r := ratio(row)) is not None:
        text += f"  => {r:.2f}x {row['against']} (goal {row['goal']})"
    return text


def numbers(n: dict[str, Any]) -> str:
    """Forward / both, or the note."""
    if n["forward"] is None and n["both"] is None:
        return n["note"]
    forward = "–" if n["forward"] is None else f"{n['forward']:.3f}"
    return forward + (f" / {n['both']:.3f}" if n["both"] is not None else "")


def floor(row: dict[str, Any]) -> float:
    """Milliseconds of the floor of what the goal is about."""
    return float(row["floor"][0 if row["ours"]["both"] is None else 1])


def ratio(row: dict[str, Any]) -> float | None:
    """Our time over that of the peer the goal names; of the floor if that is what it names."""
    which = "forward" if row["ours"]["both"] is None else "both"
    ours = row["ours"][which]
    if ours is None or row["against"] is None:
        return None
    other = floor(row) if row["against"] == "floor" else row["peers"].get(row["against"], {}).get(which)
    return ours / other if other else None


def write_table(readme: Path, results: Path) -> None:
    """Put a table for every GPU between the marks of a README."""
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    tables = "\n".join(_table(json.loads(path.read_text())) for path in sorted(results.glob("*.json")))
    readme.write_text(f"{head}{BEGIN}\n{tables}{END}{tail}")


def _table(data: dict[str, Any]) -> str:
    where, top = data["environment"], data["ceilings"]
    lines = [
        f"### {where['gpu']}",
        f"torch {where['torch']}, triton {where['triton']}, ptxas {where['ptxas']}, driver {where['driver']}, "
        f"{where['date']}; copy {top['bytes'] / 1e12:.2f} TB/s, bf16 matmul {top['flops'] / 1e12:.0f} TFLOP/s.",
        "",
        "| operation | shape | ms | from Python | floor | peers, ms | against | goal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(data["rows"], key=lambda r: (r["op"], r["shape"])):
        peers = " · ".join(f"{name} {numbers(peer)}" for name, peer in row["peers"].items())
        r = ratio(row)
        against = "" if r is None else f"{r:.2f}x {row['against']}"
        goal = "" if row["goal"] is None else f"≤ {row['goal']:.2f}x"
        eager = row["ours"].get("eager")
        called = "" if eager is None else f"{eager:.3f}"
        ours = f"{numbers(row['ours'])} | {called} | {floor(row):.3f}"
        how = f" ({row['how']})" if "how" in row else ""
        lines.append(f"| {row['op']} | {row['shape']}{how} | {ours} | {peers} | {against} | {goal} |")
    lines += [f"\nRefused: {name}: {why}" for name, why in data["refused"].items()]
    return "\n".join(lines) + "\n"
