"""What a trial's holes were filled with: a record keeps an option as the file has it, the holes inside it open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

HOLES = {"choice", "range", "log_range"}


def picked(holes: Mapping[str, Any]) -> dict[str, Any]:
    """Hole to what was picked, the holes inside options filled as well; one asked per block or stage becomes a list."""
    return {name: _filled(value, name.partition("@")[0], holes) for name, value in holes.items()}


def written(holes: Mapping[str, Any]) -> list[str]:
    """A line for each hole, `layout.mixer = {ratio: {gdn: 3, full: 1}}`: those inside an option are filled there, and
    one asked per block or stage has a value for each.
    """
    values: dict[str, list[Any]] = {}
    for name, value in picked(holes).items():
        values.setdefault(name.partition("@")[0], []).append(value)
    tops = [name for name in values if not any(name.startswith(f"{other}[") for other in values)]
    return [f"{name} = {' '.join(_in_yaml(value) for value in values[name])}" for name in tops]


def _in_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


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
