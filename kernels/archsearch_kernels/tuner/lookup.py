"""The best known configuration of a launch: the user's table, shared tables, the shipped pack, then near buckets.

ARCHSEARCH_TUNE=off takes every kernel's analytic default. ARCHSEARCH_CACHE moves the user's table from
~/.cache/archsearch; ARCHSEARCH_TUNE_DIRS lists read-only folders of tables (a team's, a cluster's). Nothing is ever
timed here: a launch that no table knows runs in the nearest bucket's configuration, or the kernel's default.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from archsearch_kernels.launch import KERNELS, Config, Kernel, Key
from archsearch_kernels.tuner.identity import Device, code_hash, compiler, device
from archsearch_kernels.tuner.known_bad import is_known_bad
from archsearch_kernels.tuner.store import BAD, Row, Table, frozen, winners

FORMAT = 1  # of a pack
PACKS = Path(__file__).parent.parent / "tuned"


@dataclass(frozen=True)
class Answer:
    """A configuration and where it comes from."""

    config: Config
    source: str  # "measured", "shared", "pack", ..., "default"
    row: Row | None = None
    steps: float = 0.0  # distance of the bucket, in doublings


def best(kernel: Kernel, key: Key, candidates: Sequence[Config]) -> Config | None:
    """The configuration of the tables for a launch on the current device; None: they know nothing."""
    if mode() == "off" or not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    found = explain(kernel, key, candidates)
    return None if found is None else found.config


def default(kernel: Kernel, key: Key, candidates: Sequence[Config]) -> Config:
    """The first candidate that no rule and no measurement on the current device excludes; the first, if all are."""
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return candidates[0]
    where, mine = device(), compiler()
    group = (kernel.name, code_hash(kernel.python), where, key.dtypes, key.flags, mine)
    for config in candidates:
        bad = is_known_bad(kernel.name, config, where, mine) or (*group, frozen(config)) in _excluded(where)
        if not bad:
            return config
    return candidates[0]


def explain(kernel: Kernel, key: Key, candidates: Sequence[Config], on: Device | None = None) -> Answer | None:
    """`best` with its source, for any device."""
    where = on or device()
    code, allowed = code_hash(kernel.python), {frozen(c) for c in candidates}
    for source, rows in _levels(where):
        answer = _nearest(rows, kernel, key, code, allowed, where, exact=True)
        if answer is not None:
            return Answer(answer.config, source, answer.row)
    for source, rows in _levels(where):
        answer = _nearest(rows, kernel, key, code, allowed, where, exact=False)
        if answer is not None:
            return Answer(answer.config, f"{source}, near", answer.row, answer.steps)
    return None


def mode() -> str:
    """ARCHSEARCH_TUNE: off, cached, quick or full. Raises ValueError for anything else."""
    value = os.environ.get("ARCHSEARCH_TUNE", "quick")
    if value not in ("off", "cached", "quick", "full"):
        raise ValueError(f"ARCHSEARCH_TUNE is '{value}'; expected off, cached, quick or full")
    return value


def user_table(of: Device) -> Path:
    """Where this user's measurements of a device are kept."""
    home = os.environ.get("ARCHSEARCH_CACHE")
    folder = Path(home) if home else Path.home() / ".cache" / "archsearch"
    return folder / "tune" / f"{of.slug}.jsonl"


def refresh() -> None:
    """Read the tables anew at the next launch."""
    _levels.cache_clear()
    _excluded.cache_clear()
    for kernel in KERNELS.values():
        kernel.forget()


@cache
def _levels(of: Device) -> list[tuple[str, list[Row]]]:
    """Sources from the nearest to the farthest, each with its winning rows."""
    levels = [("measured", _rows(user_table(of)))]
    for folder in filter(None, os.environ.get("ARCHSEARCH_TUNE_DIRS", "").split(os.pathsep)):
        levels.append((f"shared ({folder})", _rows(Path(folder) / f"{of.slug}.jsonl")))
    packs = shipped()
    levels.append(("pack", packs.pop(of.slug, [])))
    return [*levels, *((f"pack of {slug}", rows) for slug, rows in packs.items())]


def shipped() -> dict[str, list[Row]]:
    """The packs that come along, by device."""
    return {path.stem: pack(path) for path in sorted(PACKS.glob("*.json"))}


@cache
def _excluded(of: Device) -> set[tuple[Any, ...]]:
    """Configurations that were wrong, crashed, hung or did not fit, at whatever size."""
    shared = filter(None, os.environ.get("ARCHSEARCH_TUNE_DIRS", "").split(os.pathsep))
    folders = [user_table(of).parent, *map(Path, shared)]
    rows = [row for f in folders for row in Table.open(f / f"{of.slug}.jsonl").rows.values()]
    return {(*row.group, row.compiler, row.config) for row in rows if row.verdict in BAD}


def _rows(path: Path) -> list[Row]:
    return winners(Table.open(path).rows.values())


def pack(path: Path) -> list[Row]:
    """The rows of a pack; none where there is no such file. Raises ValueError for another kind of file."""
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not a tuning pack of format {FORMAT}")
    return [Row.from_json(json.dumps(row)) for row in data["rows"]]


def _nearest(
    rows: Sequence[Row],
    kernel: Kernel,
    key: Key,
    code: str,
    allowed: set[tuple[tuple[str, int], ...]],
    where: Device,
    exact: bool,
) -> Answer | None:
    """The row whose bucket is nearest; rows of this compiler before others, of this GPU before others of its kind."""
    mine = compiler()
    ranked: list[tuple[tuple[Any, ...], Row]] = []
    for row in rows:
        fits = row.kernel == kernel.name and row.code == code and row.dtypes == key.dtypes and row.flags == key.flags
        if not fits or row.config not in allowed or row.device.capability != where.capability:
            continue
        if is_known_bad(row.kernel, dict(row.config), where, mine):
            continue
        steps = _steps(dict(row.bucket), dict(key.bucket))
        if math.isinf(steps):
            continue
        if exact and (steps > 0 or row.device != where or row.compiler != mine):
            continue
        ranked.append(((row.device != where, steps, row.compiler != mine, row.position), row))
    if not ranked:
        return None
    row = min(ranked, key=lambda pair: pair[0])[1]
    return Answer(dict(row.config), "", row, _steps(dict(row.bucket), dict(key.bucket)))


def _steps(a: dict[str, int], b: dict[str, int]) -> float:
    """Distance of two buckets in doublings; infinite if they measure different things."""
    if a.keys() != b.keys():
        return math.inf
    return sum(abs(math.log2(max(1, a[n]) / max(1, b[n]))) for n in a)
