"""Turns pydantic's validation errors into the project's own messages: where, what was found, what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from archsearch.contract import Spec
from archsearch.errors import did_you_mean, one_of
from archsearch.holes import hole_name
from archsearch.yaml_source import Path_

S = TypeVar("S", bound=Spec)
_PLAIN = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


class Problems:
    """Collects problems of one file, each with its line; `origin` leads from filled paths back to the file."""

    def __init__(self, where: Callable[[Path_], str]) -> None:
        self.where = where
        self.found: dict[str, None] = {}  # ordered, without repeats
        self.origin: dict[Path_, Path_] = {}

    def add(self, path: Path_, message: str) -> None:
        """One problem at a path of the filled tree."""
        source = self.source(path)
        name = hole_name(path)
        self.found[f"{self.where(source)}: {name + ' ' if name else ''}{message}"] = None

    def source(self, path: Path_) -> Path_:
        """Where in the file a node of the filled tree came from."""
        for cut in range(len(path), -1, -1):
            if path[:cut] in self.origin:
                return self.origin[path[:cut]] + path[cut:]
        return path

    def validate(self, spec: type[S], node: Any, path: Path_) -> S | None:
        """`node` as a spec, or None with its problems added."""
        if not isinstance(node, dict):
            self.add(path, f"is {node!r}; expected a mapping")
            return None
        try:
            return spec.model_validate(node)
        except ValidationError as error:
            self._explain(error, spec, node, path)
        return None

    def _explain(self, error: ValidationError, spec: type[Spec], node: Any, path: Path_) -> None:
        expected: dict[Path_, list[str]] = {}
        items = error.errors(include_url=False)
        for item in items:
            if item["type"] == "literal_error" and any(_is_below(item["loc"], other["loc"]) for other in items):
                continue  # a union's other branch says more
            loc = _inside(node, item["loc"])
            if item["type"] == "extra_forbidden":
                known = _keys_at(spec, loc[:-1])
                self.add(
                    (*path, *loc[:-1]),
                    f"has an unknown key '{loc[-1]}'; expected {one_of(known)}.{did_you_mean(loc[-1], known)}",
                )
            elif item["type"] == "missing":
                self.add(path, f"has no '{hole_name(item['loc'])}', which is required")
            elif item["type"] == "value_error" and not str(item["ctx"]["error"]).startswith("found "):
                self.add((*path, *loc), str(item["ctx"]["error"]))
            elif item["type"] == "value_error":
                expected.setdefault(loc, []).append(str(item["ctx"]["error"]))
            else:
                expected.setdefault(loc, []).append(_expected(item))
        for loc, texts in expected.items():
            own = [text for text in texts if text.startswith("found ")]
            if own:
                self.add((*path, *loc), own[0].replace("found ", "is ", 1) + ".")
                continue
            value = _at(node, loc)
            options = [word.strip("'") for text in texts for word in text.replace(" or ", ", ").split(", ")]
            hint = did_you_mean(value, options) if isinstance(value, str) else ""
            self.add((*path, *loc), f"is {value!r}; expected {' or '.join(dict.fromkeys(texts))}.{hint}")


def _is_below(loc: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether `other` leads into another branch of the union at `loc` (whose last part names the branch)."""
    return loc != other and len(other) > len(loc) and loc[:-1] == other[: len(loc) - 1]


def _expected(item: Any) -> str:
    kind, ctx = item["type"], item.get("ctx", {})
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind == "literal_error":
        return str(ctx["expected"])
    bounds = {
        "greater_than": "above",
        "greater_than_equal": "at least",
        "less_than": "below",
        "less_than_equal": "at most",
    }
    for name, word in bounds.items():
        if kind == name:
            limit = next(iter(ctx.values()))
            return f"a number {word} {limit:g}" if isinstance(limit, float) else f"a number {word} {limit}"
    return str(item["msg"]).replace("Input should be ", "").replace("Value error, ", "")


def _inside(node: Any, loc: tuple[Any, ...]) -> Path_:
    """The part of a pydantic location that walks through the data (the rest names branches of a union)."""
    inside: Path_ = ()
    for part in loc:
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]
            inside = (*inside, part)
    return inside


def _at(node: Any, loc: Path_) -> Any:
    for part in loc:
        node = node[part]
    return node


def _keys_at(spec: type[Spec], loc: Path_) -> list[str]:
    """Keys that the (sub-)model at a location takes."""
    for part in loc:
        inner = spec.model_fields.get(str(part)) or next(
            (f for f in spec.model_fields.values() if f.alias == part), None
        )
        found = _models_in(inner.annotation) if inner is not None else []
        if not found:
            return []
        spec = found[0]
    return [field.alias or name for name, field in spec.model_fields.items()]


def _models_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
