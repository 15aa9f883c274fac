"""What a trial's holes were filled with: a record keeps an option as the file has it, the holes inside it open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HOLES = {"choice", "range", "log_range"}


def picked(holes: Mapping[str, Any]) -> dict[str, Any]:
    """Hole to what was picked, the holes inside options filled as well; one asked per block or stage becomes a list."""
    return {name: _filled(value, name.partition("@")[0], holes) for name, value in holes.items()}


def _filled(option: Any, name: str, holes: Mapping[str, Any]) -> Any:
    """`option` as it was picked for the hole `name`; a hole in it is called after the option's place in the file."""
    inside = next((key for key in holes if key.startswith(f"{name}[")), None)
    if inside is None:
        return option
    return _fill(option, f"{name}[{inside[len(name) + 1 :].partition(']')[0]}]", holes)


def _fill(node: Any, path: str, holes: Mapping[str, Any]) -> Any:
    if isinstance(node, Mapping):
        if HOLES & node.keys():
            return _pick(node, path, holes)
        return {key: _fill(value, f"{path}.{key}", holes) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, f"{path}[{i}]", holes) for i, value in enumerate(node)]
    return node


def _pick(hole: Any, path: str, holes: Mapping[str, Any]) -> Any:
    if path in holes:
        return _filled(holes[path], path, holes)
    asked = [_filled(value, path, holes) for name, value in holes.items() if name.startswith(f"{path}@")]
    return asked or hole
