"""Holes: `{choice: [...]}`, `{range: [lo, hi, step]}`, `{log_range: [lo, hi]}` anywhere in a tree of plain data.

`fill` replaces each hole by what a Chooser picks. A hole's name is its path in the file; one inside an option exists
only when that option is picked. `per: block` (or `per: stage`) asks again for every block (or stage).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from archsearch.errors import did_you_mean
from archsearch.quantity import parse_number
from archsearch.space.yaml_source import Path_

HOLES = ("choice", "range", "log_range")
PER = ("block", "stage")


class HoleError(ValueError):
    """A hole that is not well formed; `path` is where."""

    def __init__(self, message: str, path: Path_) -> None:
        self.path = path
        super().__init__(message)


class Chooser(Protocol):
    """What fills holes: an Optuna trial, a random generator, an enumerator. The same name is asked once."""

    def choice(self, name: str, options: Sequence[Any]) -> int:
        """Index of an option (options may themselves hold holes)."""

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        """A whole number in low, low + step, ..., high."""

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        """A real number in [low, high]."""


@dataclass
class Filling:
    """One fill in progress: the chooser, what was picked under which name, and where each filled node came from.

    `picked` holds the values themselves (an option as it stands in the file, or a number), so that records can be read
    and matched with another version of the space.
    """

    chooser: Chooser
    picked: dict[str, Any] = field(default_factory=dict)
    indices: dict[str, int] = field(default_factory=dict)
    origin: dict[Path_, Path_] = field(default_factory=dict)
    block: int | None = None
    stage: int | None = None

    def fill(self, node: Any, path: Path_, source: Path_ | None = None) -> Any:
        """`node` without holes. `path`: its place in the filled tree; `source`: its place in the file."""
        source = path if source is None else source
        self.origin[path] = source
        if is_hole(node):
            return self._pick(node, path, source)
        if isinstance(node, dict):
            return {key: self.fill(value, (*path, key), (*source, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self.fill(value, (*path, i), (*source, i)) for i, value in enumerate(node)]
        return node

    def _pick(self, hole: dict[str, Any], path: Path_, source: Path_) -> Any:
        kind = check_hole(hole, source)
        name = hole_name(source) + self._suffix(hole, source)
        if kind == "choice":
            i = self.choose(name, hole["choice"])
            return self.fill(hole["choice"][i], path, (*source, "choice", i))
        if name not in self.picked:
            low, high, *rest = check_bounds(kind, hole[kind], (*source, kind))
            if kind == "range" and all(isinstance(bound, int) for bound in (low, high, *rest)):
                step = int(rest[0]) if rest else 1
                top = int(low) + (int(high) - int(low)) // step * step
                self.picked[name] = self.chooser.integer(name, int(low), top, step)
            else:
                real_step = float(rest[0]) if rest else None
                self.picked[name] = self.chooser.real(name, float(low), float(high), real_step, kind == "log_range")
        return self.picked[name]

    def choose(self, name: str, options: Sequence[Any]) -> int:
        """Index of the option picked under a name; asks the chooser the first time."""
        if name not in self.indices:
            self.indices[name] = self.chooser.choice(name, options)
            self.picked[name] = options[self.indices[name]]
        return self.indices[name]

    def _suffix(self, hole: dict[str, Any], source: Path_) -> str:
        per = hole.get("per")
        if per is None:
            return ""
        at = self.block if per == "block" else self.stage
        if at is None:
            raise HoleError(f"asks per: {per}, which only holes inside mixers and ffns can", source)
        return f"@{at}" if per == "block" else f"@stage{at}"


def is_hole(node: Any) -> bool:
    """Whether a node is a hole (well formed or not)."""
    return isinstance(node, dict) and any(key in node for key in HOLES)


def hole_hint(node: Any) -> str:
    """What may have been meant where a single value was due: a misspelt hole, or a list to choose from."""
    if isinstance(node, dict):
        hints = (did_you_mean(str(key).lower(), HOLES) for key in node)
        return next((hint for hint in hints if hint), "")
    if isinstance(node, list) and node and not any(isinstance(item, dict | list) for item in node):
        return f" To choose one of them, write {{choice: [{', '.join(map(str, node))}]}}."
    return ""


def hole_name(source: Path_) -> str:
    """`mixers.gdn.expand_v`, `layout.mixer[1].ratio.gdn`: the path with option indices in brackets."""
    name = ""
    for part in source:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part != "choice":
            name += f".{part}" if name else part
    return name


def check_hole(hole: dict[str, Any], path: Path_) -> str:
    """The hole's kind; raises HoleError if it is not well formed."""
    kinds = [kind for kind in HOLES if kind in hole]
    if len(kinds) > 1:
        raise HoleError(f"holds {' and '.join(kinds)}; expected one of them", path)
    kind = kinds[0]
    for key in hole:
        if key not in (kind, "per"):
            hint = did_you_mean(key, [kind, "per"])
            raise HoleError(f"has '{key}' beside {kind}; a hole holds {kind} and perhaps per.{hint}", path)
    if "per" in hole and hole["per"] not in PER:
        raise HoleError(f"is {hole['per']!r}; expected block or stage", (*path, "per"))
    value = hole[kind]
    if kind == "choice":
        if not isinstance(value, list) or not value:
            raise HoleError(f"is {value!r}; expected a list with at least one option", (*path, kind))
        written = [repr(option) for option in value]
        for i, option in enumerate(written):
            if option in written[:i]:
                raise HoleError(f"is {option}, which is an option already; write each once", (*path, kind, i))
        return kind
    check_bounds(kind, value, (*path, kind))
    return kind


def check_bounds(kind: str, value: Any, path: Path_) -> list[float]:
    """The ends (and step) of a range as numbers; raises HoleError."""
    wanted = "[low, high] or [low, high, step]" if kind == "range" else "[low, high]"
    if not isinstance(value, list) or len(value) not in ((2, 3) if kind == "range" else (2,)):
        raise HoleError(f"is {value!r}; expected {wanted}", path)
    try:
        numbers = [b if isinstance(b, int) and not isinstance(b, bool) else parse_number(b) for b in value]
    except ValueError:
        raise HoleError(f"is {value!r}; expected {wanted} as numbers", path) from None
    if not all(math.isfinite(number) for number in numbers) or numbers[0] > numbers[1]:
        raise HoleError(f"is {value!r}; expected a low end that is not above the high end", path)
    if kind == "log_range" and numbers[0] <= 0:
        raise HoleError(f"is {value!r}; expected a low end above 0", path)
    if len(numbers) == 3 and numbers[2] <= 0:
        raise HoleError(f"is {value!r}; expected a step above 0", path)
    return numbers


def find_holes(node: Any, path: Path_ = ()) -> list[Path_]:
    """Paths of all holes below a node, nested ones included."""
    found = [path] if is_hole(node) else []
    items: Sequence[tuple[str | int, Any]] = ()
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    for key, value in items:
        found += find_holes(value, (*path, key))
    return found
