"""Mixers and FFNs for people: what a kind is, whose paper it follows, and its options, all read off its spec."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from fractions import Fraction
from itertools import pairwise
from typing import Any

from archsearch.contract import Spec
from archsearch.errors import UserError, did_you_mean, one_of
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS

_ALSO_CALLED = {
    word: kind
    for kind, words in (
        ("attention", "mha gqa mqa swa full self_attention sliding_window"),
        ("scalar_decay", "retnet lightning simple_gla"),
        ("gated_deltanet", "gdn"),
        ("deltanet", "delta_net"),
        ("short_conv", "conv"),
        ("parallel", "hymba"),
        ("mamba", "ssm s6"),
        ("mamba2", "ssd"),
        ("mlp", "gelu"),
        ("swiglu", "glu"),
        ("moe", "mixture_of_experts"),
    )
    for word in words.split()
}
_BOUNDS = (
    ("exclusiveMinimum", "above"),
    ("gt", "above"),
    ("minimum", "at least"),
    ("ge", "at least"),
    ("exclusiveMaximum", "below"),
    ("lt", "below"),
    ("maximum", "at most"),
    ("le", "at most"),
    ("multipleOf", "a multiple of"),
)
_PLAIN = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "array": "list"}


def kind_names() -> list[str]:
    """All kinds of mixers and FFNs, plug-ins included; `none` is both."""
    return list(dict.fromkeys([*MIXERS.names(), *FFNS.names()]))


def nearest_kind(word: str) -> str:
    """` Did you mean 'gated_deltanet'?` for gdn: another name of the field for a kind, or the nearest kind."""
    known = _ALSO_CALLED.get(word.lower())
    return f" Did you mean '{known}'?" if known else did_you_mean(word, kind_names())


def describe_kind(name: str) -> str:
    """What `kind: name` is and takes. Raises UserError with the nearest kind."""
    registries = [registry for registry in (MIXERS, FFNS) if name in registry.names()]
    if not registries:
        raise UserError(f"unknown kind '{name}'; expected {one_of(kind_names())}.{nearest_kind(name)}")
    return "\n\n".join(_describe(registry.what, registry.load(name), name) for registry in registries)


def _describe(what: str, spec: type[Spec], name: str) -> str:
    source = (sys.modules[spec.__module__].__doc__ or "").strip().partition("\n")[0]
    lines = [f"{name} ({what}): {source}" if source else f"{name} ({what})", "", inspect.cleandoc(spec.__doc__ or "")]
    rows = [("option", "value", "default", "")]
    found, schema = meanings(spec), spec.model_json_schema(by_alias=True)
    for option, told in schema["properties"].items():
        if option == "kind":
            continue
        default = _written(told["default"]) if "default" in told else "required"
        value = "tokens, or '1/4 context'" if option in getattr(spec, "spans", ()) else _value(told)
        rows.append((option, value, default, found.get(option, "")))
    if len(rows) > 1:
        widths = [max(len(row[c]) for row in rows) for c in range(3)]
        lines += ["", *("  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows)]
    return "\n".join(lines)


def meanings(spec: type[Spec]) -> dict[str, str]:
    """The string below each option in the source, or its field's description; parents first."""
    found: dict[str, str] = {}
    for cls in reversed(spec.__mro__):
        if not issubclass(cls, Spec):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            continue  # a class whose source is not at hand
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, below in pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                    found[name] = meaning
    return found | {name: field.description for name, field in spec.model_fields.items() if field.description}


def _value(told: dict[str, Any]) -> str:
    """A JSON schema in words: `whole number, at least 1`, `rope | none`."""
    if "anyOf" in told:
        return " | ".join(_value(each) for each in told["anyOf"] if each.get("type") != "null")
    if "enum" in told:
        return " | ".join(map(str, told["enum"]))
    if "const" in told:
        return str(told["const"])
    bounds = [f"{word} {_written(told[key])}" for key, word in _BOUNDS if key in told]
    return ", ".join([_PLAIN.get(told.get("type", ""), "value"), *bounds])


def _written(value: Any) -> str:
    """As one writes it in YAML: 8/3, 10000, true; a dash for what is left out."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = Fraction(value).limit_denominator(16)
        return str(short) if float(short) == value else f"{value:g}"
    return str(value)
