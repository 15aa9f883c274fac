"""The function that builds a model's blocks, as a person would write it: one loop, one branch for each kind of layer.

The constructor calls are those of `spec.call(site)`, which the search model is built by too.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from archsearch.architecture import ModelSpec
from archsearch.contract import ModuleCall
from archsearch.errors import ExportError
from archsearch.export.source import literal_text

Calls = list[ModuleCall | None]
SHORT = 80  # a choice of this many characters needs no lines of its own


class Classes:
    """The classes that calls name, and what each is called in the written code."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def name(self, target: str) -> str:
        """The class's own name, or a numbered one when two packages use the same."""
        if target not in self._names:
            own = target.partition(":")[2]
            if not own.isidentifier():
                raise ExportError(f"{target!r} does not name a class at the top level of a module")
            options = [own, *(f"{own}{n}" for n in range(2, 2 + len(self._names)))]
            self._names[target] = next(o for o in options if o not in self._names.values())
        return self._names[target]

    def targets(self) -> list[str]:
        """All targets, in the order in which they were first named."""
        return list(self._names)

    def imports(self) -> str:
        """An import statement for each."""
        lines = []
        for target, name in self._names.items():
            module, _, own = target.partition(":")
            lines.append(f"from {module} import {own}" + ("" if name == own else f" as {name}"))
        return "\n".join(lines)


def make_blocks_source(spec: ModelSpec, classes: Classes, padding: Sequence[str] | None = None) -> str:
    """`def make_blocks() -> list[Block]` for this model; the constants D_MODEL and N_BLOCKS are taken as defined.

    padding: for the blocks of `hf.template`, how each of them goes on after padding; None: those of `template`.
    """
    n = spec.n_blocks
    mixers = [None if b.mixer.kind == "none" else b.mixer.call(spec.site(i)) for i, b in enumerate(spec.blocks)]
    ffns = [None if b.ffn.kind == "none" else b.ffn.call(spec.site(i)) for i, b in enumerate(spec.blocks)]
    lines = [*_choice("mixer", mixers, spec, classes), *_choice("ffn", ffns, spec, classes)]
    sharing = {b.kv_from for b in spec.blocks if b.kv_from is not None}
    sharing |= {i for i, b in enumerate(spec.blocks) if b.kv_from is not None}
    options = {
        "norm": literal_text(spec.trunk.norm),
        "norm_place": literal_text(spec.trunk.norm_place),
        "residual_scale": "1.0" if spec.trunk.residual == "plain" else "(2 * N_BLOCKS) ** -0.5",
        "shares_kv": condition(sharing, set(range(n)) - sharing, n),
    }
    if padding is not None:
        options["padding"] = _either(padding, [i for i, b in enumerate(spec.blocks) if b.mixer.kind != "none"], n)
    written = ", ".join(f"{name}={text}" for name, text in options.items())
    first = "D_MODEL" if padding is None else "D_MODEL, i"
    lines.append(f"blocks.append(Block({first}, mixer, ffn, {written}))")
    variable = "i" if any(re.search(r"\bi\b", line) for line in lines) else "_"
    body = [
        '"""The blocks, first to last."""',
        "blocks: list[Block] = []",
        f"for {variable} in range(N_BLOCKS):",
        *_indented(lines),
        *_ties("mixer", [b.mixer_weights_from for b in spec.blocks], padding is not None),
        *_ties("ffn", [b.ffn_weights_from for b in spec.blocks], padding is not None),
        "return blocks",
    ]
    return "\n".join(["def make_blocks() -> list[Block]:", *_indented(body)]) + "\n"


def _choice(name: str, calls: Calls, spec: ModelSpec, classes: Classes) -> list[str]:
    """Lines that set `name` to what block i has."""
    writer = _Writer(spec, classes, calls)
    variants: dict[str, set[int]] = {}
    for i, call in enumerate(calls):
        text = "None" if call is None else writer.call(call)
        variants.setdefault(text, set()).add(i)
    commonest = max(reversed(variants), key=lambda text: len(variants[text]))
    if len(variants) == 1:
        return [f"{name} = {commonest}"]
    lines: list[str] = []
    left = set(range(len(calls)))
    if len(variants) == 2:
        rare, members = next((text, members) for text, members in variants.items() if text != commonest)
        line = f"{name} = {rare} if {condition(members, left - members, len(calls))} else {commonest}"
        if len(line) <= SHORT:
            return [line]
    everybody = set(left)
    for text, members in variants.items():
        if text != commonest:
            tests = [condition(members, others - members, len(calls)) for others in (everybody, left)]
            lines.append(f"{'elif' if lines else 'if'} {min(tests, key=len)}:")
            lines.append(f"    {name} = {text}")
            left -= members
    return [*lines, "else:", f"    {name} = {commonest}"]


def condition(members: set[int], others: set[int], n: int) -> str:
    """A test on i that holds for all members and for none of the others; indices in neither do not matter."""
    if not members or not others:
        return str(bool(members))
    low, high = min(members), max(members)
    if low == high:
        return f"i == {low}"
    if high < min(others):
        return f"i < {high + 1}"
    if low > max(others):
        return f"i >= {low}"
    for period in range(2, n // 2 + 1):
        rests = {i % period for i in members}
        if rests.isdisjoint(i % period for i in others):
            if len(rests) == 1:
                return f"i % {period} == {rests.pop()}"
            if len(rests) == period - 1:
                return f"i % {period} != {(set(range(period)) - rests).pop()}"
            return f"i % {period} in {tuple(sorted(rests))}"
    if not any(low <= i <= high for i in others):
        return f"{low} <= i < {high + 1}"
    if len(others) == 1:
        return f"i != {others.pop()}"
    return f"i in {tuple(sorted(members))}" if len(members) <= len(others) else f"i not in {tuple(sorted(others))}"


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Arguments of a call and of the calls in it, by where they stand."""
    if isinstance(value, ModuleCall):
        for name, argument in value.arguments.items():
            yield from _leaves(argument, (*path, value.target, name))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, str(i)))
    else:
        yield path, value


def _index_arguments(calls: Calls) -> set[tuple[str, ...]]:
    """Arguments called layer_idx or the like that are the block's index in every block that has them."""
    found: dict[tuple[str, ...], list[bool]] = {}
    for i, call in enumerate(calls):
        for path, value in _leaves(call):
            if path and "layer" in path[-1]:
                found.setdefault(path, []).append(type(value) is int and value == i)
    return {path for path, same in found.items() if all(same) and len(same) > 1}


class _Writer:
    """Writes constructor calls; arguments that are the block's index, the width or the depth go by their names."""

    def __init__(self, spec: ModelSpec, classes: Classes, calls: Calls) -> None:
        self.spec = spec
        self.classes = classes
        self.follows_index = _index_arguments(calls)

    def call(self, call: ModuleCall, path: tuple[str, ...] = ()) -> str:
        """`Class(...)`, without the arguments that are as the class has them by default."""
        module, _, own = call.target.partition(":")
        parameters = inspect.signature(getattr(importlib.import_module(module), own)).parameters
        parts: list[str] = []
        for name, value in call.arguments.items():
            here = (*path, call.target, name)
            default = parameters[name].default if name in parameters else inspect.Parameter.empty
            if here not in self.follows_index and value == default and type(value) is type(default):
                continue
            is_first = not parts and name == next(iter(parameters))
            text = self._argument(name, value, here)
            parts.append(text if is_first else f"{name}={text}")
        return f"{self.classes.name(call.target)}({', '.join(parts)})"

    def _argument(self, name: str, value: Any, here: tuple[str, ...]) -> str:
        if here in self.follows_index:
            return "i"
        if name == "d_model" and value == self.spec.d_model:
            return "D_MODEL"
        if name in ("n_layers", "n_blocks") and value == self.spec.n_blocks:
            return "N_BLOCKS"
        return self._value(value, here)

    def _value(self, value: Any, path: tuple[str, ...]) -> str:
        if isinstance(value, ModuleCall):
            return self.call(value, path)
        if isinstance(value, list | tuple):
            inner = ", ".join(self._value(item, (*path, str(i))) for i, item in enumerate(value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if value is None or isinstance(value, bool | int | float | str):
            return literal_text(value)
        raise ExportError(f"the argument {path[-1]}={value!r} of {path[-2]} cannot be written as code")


def _either(values: Sequence[str], where: list[int], n: int) -> str:
    """An expression for the one of two texts that block i has; blocks that are not in `where` do not matter."""
    members: dict[str, set[int]] = {}
    for i in where:
        members.setdefault(values[i], set()).add(i)
    if len(members) < 2:
        return literal_text(next(iter(members), "rows"))
    (one, those), (other, others) = members.items()
    return f"{literal_text(one)} if {condition(those, others, n)} else {literal_text(other)}"


def _ties(what: str, sources: Sequence[int | None], by_call: bool) -> list[str]:
    """Statements that make blocks use an earlier block's mixer or FFN."""
    readers: dict[int, list[int]] = {}
    for i, source in enumerate(sources):
        if source is not None:
            readers.setdefault(source, []).append(i)
    lines = []
    for source, blocks in readers.items():
        margin, block = ("", f"blocks[{blocks[0]}]") if len(blocks) == 1 else ("    ", "blocks[i]")
        if len(blocks) > 1:
            lines.append(f"for i in {tuple(blocks)}:")
        if by_call:
            lines.append(f"{margin}{block}.share({what}=blocks[{source}].{what})")
        else:
            lines.append(f"{margin}{block}.{what} = blocks[{source}].{what}  # the same weights")
    return lines


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]
