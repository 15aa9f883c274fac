"""How an alphabet fills the depth: pattern, ratio + place, blocks + grow, stages, with fixed ends.

`resolve` turns one filled layout (no holes) into one (name, stage) per block, at any number of blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from archsearch.errors import did_you_mean, one_of
from archsearch.quantity import parse_number

N = TypeVar("N", bound=Hashable)
FORMS = ("pattern", "ratio", "each", "blocks", "stages")
KEYS = {
    "pattern": {"pattern", "first", "last"},
    "ratio": {"ratio", "place", "first", "last"},
    "each": {"each", "grow", "first", "last"},
    "blocks": {"blocks", "grow", "first", "last"},
    "stages": {"stages", "first", "last"},
}
PLACES = ("even", "first", "middle", "last", "ends")


class LayoutError(ValueError):
    """A layout that cannot be resolved; `path` leads from the layout node to the culprit, which the message continues:
    `layout.mixer.grow` + `is 'strech'; expected stretch or stack`.
    """

    def __init__(self, message: str, *path: str | int) -> None:
        self.path = path
        super().__init__(message)


@dataclass(frozen=True)
class Slot:
    """What stands at one block: a name of the alphabet, and the stage it belongs to (0 without stages)."""

    name: str
    stage: int = 0


def resolve(layout: Any, n_blocks: int, names: set[str]) -> list[Slot]:
    """One slot per block. Raises LayoutError for unknown names, wrong keys or shares that do not add up."""
    if isinstance(layout, str):
        layout = {"pattern": [layout]}
    if isinstance(layout, list):
        layout = {"pattern": layout}
    form = _form(layout)
    if form == "pattern":
        pattern = _names(layout["pattern"], names, "pattern")
        how: Literal["stretch", "stack"] = "stack" if n_blocks >= len(pattern) else "stretch"  # nothing of it is lost
        once = {name: Slot(name) for name in pattern}
        slots = [once[name] for name in grow(pattern, n_blocks, how)]
    elif form == "ratio":
        slots = [Slot(name) for name in _by_ratio(layout, n_blocks, names)]
    elif form == "stages":
        slots = _stages(layout["stages"], n_blocks, names)
    else:
        listed = _names(layout[form], names, form)
        slots = [Slot(name) for name in grow(listed, n_blocks, layout.get("grow", "stretch"))]
    for key, at_end in (("first", False), ("last", True)):
        if key in layout:
            fixed = layout[key] if isinstance(layout[key], list) else [layout[key]]
            fixed = _names(fixed, names, key)[:n_blocks]
            start = n_blocks - len(fixed) if at_end else 0
            for i, name in enumerate(fixed, start):
                slots[i] = Slot(name, slots[i].stage)
    return slots


def _form(layout: Any) -> str:
    if not isinstance(layout, dict):
        raise LayoutError(f"is {layout!r}; expected a mapping with {one_of(FORMS)}")
    forms = [form for form in FORMS if form in layout]
    if len(forms) != 1:
        nearest = "".join(did_you_mean(key, FORMS) for key in layout if key not in FORMS)
        found = " and ".join(forms) or f"{', '.join(map(str, layout)) or 'nothing'}"
        raise LayoutError(f"has {found}; expected exactly {one_of(FORMS)}.{nearest}")
    for key in layout:
        if key not in KEYS[forms[0]]:
            known = KEYS[forms[0]]
            raise LayoutError(f"has an unknown key '{key}'; expected {one_of(known)}.{did_you_mean(key, known)}")
    return forms[0]


def _names(listed: Any, names: set[str], *path: str | int) -> list[str]:
    if not isinstance(listed, list) or not listed:
        raise LayoutError(f"is {listed!r}; expected a list of names", *path)
    for i, name in enumerate(listed):
        if not isinstance(name, str) or name not in names:
            raise LayoutError(f"is {name!r}; expected {one_of(names)}.{did_you_mean(name, names)}", *path, i)
    return listed


def _number(value: Any, expected: str, *path: str | int) -> float:
    try:
        return parse_number(value)
    except ValueError:
        raise LayoutError(f"is {value!r}; expected {expected}", *path) from None


def shrink_pairs(mixer: Any, ffn: Any, n_blocks: int) -> list[tuple[str, str]] | None:
    """Two lists of one length brought to fewer blocks together, so that what stood side by side still does.

    None where that is not the case and each is resolved for itself.
    """
    mixers, ffns = _shrinkable(mixer), _shrinkable(ffn)
    if mixers is None or ffns is None or len(mixers) != len(ffns) or n_blocks >= len(mixers):
        return None
    return grow(list(zip(mixers, ffns, strict=True)), n_blocks)


def _shrinkable(layout: Any) -> list[str] | None:
    """The list of a layout that is `blocks` or a pattern and nothing else, if fewer blocks keep its relative places."""
    if isinstance(layout, list):
        return layout
    if not isinstance(layout, dict) or set(layout) not in ({"pattern"}, {"blocks"}, {"blocks", "grow"}):
        return None
    return None if layout.get("grow") == "stack" else layout.get("pattern", layout.get("blocks"))


def grow(listed: list[N], n_blocks: int, how: Literal["stretch", "stack"] = "stretch") -> list[N]:
    """A list brought to another depth: stretch keeps relative positions, stack repeats the list.

    Stretching to fewer blocks keeps every name's share (largest remainder, at least one of each while there is room)
    and puts the survivors in the order of their relative positions.
    """
    if how not in ("stretch", "stack"):
        raise LayoutError(f"is {how!r}; expected stretch or stack", "grow")
    length = len(listed)
    if how == "stack":
        return [listed[i % length] for i in range(n_blocks)]
    if n_blocks >= length:
        return [listed[i * length // n_blocks] for i in range(n_blocks)]
    counts = apportion(Counter(listed), n_blocks)
    kept: list[tuple[int, N]] = []
    for name, count in counts.items():
        places = [i for i, other in enumerate(listed) if other == name]
        kept += [(places[(2 * k + 1) * len(places) // (2 * count)], name) for k in range(count)]
    return [name for _, name in sorted(kept, key=lambda pair: pair[0])]


def apportion(shares: Mapping[N, float], total: int) -> dict[N, int]:
    """Whole counts in proportion to `shares` that add up to `total` (largest remainder), at least one of each."""
    weight = sum(shares.values())
    exact = {name: total * share / weight for name, share in shares.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], list(exact).index(name)))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    for name in by_remainder:
        most = max(counts, key=lambda other: counts[other])
        if counts[name] == 0 and counts[most] > 1:
            counts[name], counts[most] = 1, counts[most] - 1
    return counts


def _by_ratio(layout: dict[str, Any], n_blocks: int, names: set[str]) -> list[str]:
    ratio, place = layout["ratio"], layout.get("place", {})
    if not isinstance(ratio, dict) or not ratio:
        raise LayoutError(f"is {ratio!r}; expected names with their shares, such as {{gdn: 3, full: 1}}", "ratio")
    shares = {}
    for name, share in ratio.items():
        _names([name], names, "ratio")
        shares[name] = _number(share, "a share of at least 0, such as 3", "ratio", name)
        if shares[name] < 0:
            raise LayoutError(f"is {share!r}; expected a share of at least 0, such as 3", "ratio", name)
    shares = {name: share for name, share in shares.items() if share > 0}
    if not shares:
        raise LayoutError("has no share above 0", "ratio")
    counts = apportion(shares, n_blocks)
    if not isinstance(place, dict):
        raise LayoutError(f"is {place!r}; expected names with their places, such as {{full: even}}", "place")
    slots: list[str | None] = [None] * n_blocks
    for name, where in place.items():
        _names([name], set(ratio), "place")
        for i in _places(where, counts.get(name, 0), slots, name):
            slots[i] = name
    for name in sorted((n for n in counts if n not in place), key=lambda n: counts[n])[:-1]:
        for i in _places("even", counts[name], slots, name):  # the rest mix evenly, the most common name last
            slots[i] = name
    left = [name for name in counts if counts[name] > slots.count(name)]
    return [name or left[0] for name in slots]


def _places(where: Any, count: int, slots: list[str | None], name: str) -> list[int]:
    """Indices for `count` blocks: `where` names a rule over the slots that are still free."""
    if where not in PLACES:
        raise LayoutError(f"is {where!r}; expected {one_of(PLACES)}.{did_you_mean(where, PLACES)}", "place", name)
    free = [i for i, slot in enumerate(slots) if slot is None]
    n = len(free)
    if where == "even":  # the last of each of `count` equal groups, as 3:1 hybrids do (Qwen3-Next: 3, 7, 11, ...)
        chosen = [(k + 1) * n // count - 1 for k in range(count)]
    elif where == "first":
        chosen = list(range(count))
    elif where == "last":
        chosen = list(range(n - count, n))
    elif where == "middle":
        start = (n - count) // 2
        chosen = list(range(start, start + count))
    else:  # ends: half in front, half behind, the odd one behind
        chosen = [*range(count // 2), *range(n - (count - count // 2), n)]
    return [free[i] for i in chosen]


def freeze(layout: Any, n_blocks: int, choose: Callable[[tuple[str | int, ...], int, list[Any]], int]) -> Any:
    """The layout with every `each` replaced by the `blocks` that `choose(path, block, options)` picks.

    Blocks are numbered from 0 within the layout that holds the `each`; the list then grows to other depths.
    """
    if not isinstance(layout, dict):
        return layout
    if isinstance(layout.get("each"), list):
        options = layout["each"]
        picks = [options[choose(("each",), i, options)] for i in range(n_blocks)] if options else []
        return {**{key: value for key, value in layout.items() if key != "each"}, "blocks": picks}
    if isinstance(layout.get("stages"), list):
        bounds = _bounds(layout["stages"], n_blocks)
        frozen = []
        for k, stage in enumerate(layout["stages"]):

            def inner(path: tuple[str | int, ...], i: int, options: list[Any], k: int = k) -> int:
                return choose(("stages", k, *path), i, options)

            frozen.append(freeze(stage, bounds[k + 1] - bounds[k], inner))
        return {**layout, "stages": frozen}
    return layout


def _bounds(stages: Any, n_blocks: int) -> list[int]:
    if not isinstance(stages, list) or not stages:
        raise LayoutError(f"is {stages!r}; expected a list of stages", "stages")
    bounds, total = [0], 0.0
    for k, stage in enumerate(stages):
        if not isinstance(stage, dict) or "of" not in stage:
            raise LayoutError(
                f"is {stage!r}; expected a mapping with 'of: <fraction of the depth>' and a layout", "stages", k
            )
        share = _number(stage["of"], "a fraction in (0, 1]", "stages", k, "of")
        if not 0 < share <= 1:
            raise LayoutError(f"is {stage['of']!r}; expected a fraction in (0, 1]", "stages", k, "of")
        total += share
        bounds.append(round(total * n_blocks))
    if abs(total - 1) > 1e-6:
        raise LayoutError(f"has fractions that add up to {total:g}; expected 1", "stages")
    return bounds


def _stages(stages: Any, n_blocks: int, names: set[str]) -> list[Slot]:
    bounds = _bounds(stages, n_blocks)
    slots: list[Slot] = []
    for k, stage in enumerate(stages):
        layout = {key: value for key, value in stage.items() if key != "of"}
        try:
            inner = resolve(layout, bounds[k + 1] - bounds[k], names)
        except LayoutError as error:
            raise LayoutError(str(error), "stages", k, *error.path) from None
        slots += [Slot(slot.name, k) for slot in inner]
    return slots
