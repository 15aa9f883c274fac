"""docs/language.md against the code: its tables are made from the specs, its examples are loaded, its names are all.

python tests/test_language.py     writes the tables anew, after an option was added or a comment improved
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import pytest
import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from archsearch import quantity, settings
from archsearch.architecture import Scale, Trunk
from archsearch.choosers import RandomChooser
from archsearch.contract import MixerSpec
from archsearch.describe import meanings
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.objectives import OBJECTIVES
from archsearch.space import SearchSpace, layout, rules, sections, share
from archsearch.space.holes import HOLES, PER

PAGE = Path(__file__).parent.parent / "docs" / "language.md"
TABLE = re.compile(r"(<!-- table: ([\w. ]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
READ_BY: dict[Callable[..., Any], str] = {
    quantity.parse_count: "whole number",
    quantity.parse_bytes: "size",
    quantity.parse_seconds: "duration",
    quantity.parse_number: "number",
    quantity.parse_span: "tokens, or `a/b context`",
    settings._fraction: "fraction in (0, 1]",
    share._depth: "`middle`, or a fraction of the depth",
    share._names: "a name, or a list of them",
}
PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}
BOUNDS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
    annotated_types.MultipleOf: ("multiple_of", "multiple of"),
}


def wanted(hint: Any) -> str:
    """A field's type in words: `whole number ≥ 1`, or the words that it may be."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *metadata = typing.get_args(hint)
        if inner is MixerSpec:
            return "names of mixers"
        known = [READ_BY[item.func] for item in metadata if isinstance(item, BeforeValidator) and item.func in READ_BY]
        spread = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        bounds = [
            f"{sign} {getattr(bound, name):g}"
            for bound in spread
            for cls, (name, sign) in BOUNDS.items()
            if isinstance(bound, cls)
        ]
        return " ".join([known[0] if known else wanted(inner), *([", ".join(bounds)] if bounds else [])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(wanted(part) for part in typing.get_args(hint) if part is not type(None))
    if origin is tuple:
        return f"list: {wanted(typing.get_args(hint)[0])}"
    if origin is dict:
        key, value = typing.get_args(hint)
        return f"mapping of {wanted(key)} to {wanted(value)}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return "mapping, below"
    return PLAIN[hint]


def default(field: FieldInfo) -> str:
    """A default as YAML says it; a dash where there is none to write."""
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, BaseModel) or value in ((), {}):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(f'{part:g}' for part in value)}]`"
    if isinstance(value, float) and not value.is_integer():
        part = Fraction(value).limit_denominator(9)
        return f"`{part}`" if abs(part - Fraction(value)) < 1e-9 and part.denominator % 2 else f"`{value:g}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def one_line(text: str) -> str:
    return " ".join(text.split())


def explained(cls: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """A class's docstring but for what it says of single fields; and that, or what stands beside or below them."""
    names = "|".join(sorted(cls.model_fields, key=len, reverse=True))
    comments = {name: one_line(text) for name, text in meanings(cls).items()}
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if isinstance(base, type) and issubclass(base, BaseModel) and base.__module__.startswith("archsearch"):
            lines = inspect.getsource(base).splitlines()
            for line in lines:
                if (found := re.match(rf"    ({names})_?: .*?  # (.*)$", line)) is not None:
                    said[found[1]] = found[2]
    intro = []
    for paragraph in re.split(r"\n\n|(?<=\.)\n(?=[A-Z])", inspect.cleandoc(cls.__doc__ or "")):
        first, *rest = re.split(rf"(?:^|(?<=[.;] ))({names}): ", " ".join(paragraph.split()))
        if first:
            intro.append(re.sub(r";$", ".", first.strip()).replace("None: ", "left out: "))
        for name, text in zip(rest[::2], rest[1::2], strict=True):
            said[name] = "; ".join(filter(None, [text.strip().rstrip(".;"), said.get(name)]))
    return "\n\n".join(textwrap.fill(text, 120) for text in intro), comments | said


def options(cls: type[BaseModel], intro: bool = True) -> str:
    """The table of a spec's keys."""
    hints = typing.get_type_hints(cls, include_extras=True)
    about, comments = explained(cls)
    rows = []
    for name, field in cls.model_fields.items():
        if name == "kind" and cls is not settings.Task:
            continue
        meaning = comments.get(name, "").replace("None: ", "left out: ").replace("|", r"\|")
        rows.append(f"| `{field.alias or name}` | {wanted(hints[name])} | {default(field)} | {meaning} |")
    table = "\n".join(["| key | value | default | |", "| --- | --- | --- | --- |", *rows]) if rows else "No options."
    return f"{about}\n\n{table}" if intro and about else table


def objectives() -> str:
    """The table of objectives."""
    rows = ["| name | unit | better | read | at scale | |", "| --- | --- | --- | --- | --- | --- |"]
    when = {"graph": "from the layout", "bench": "measured, random weights", "trained": "after training"}
    for name in OBJECTIVES.table:
        one = OBJECTIVES.load(name)
        better = {"min": "less", "max": "more"}[one.goal]
        rows.append(f"| `{name}` | {one.unit} | {better} | {when[one.stage]} | {one.scale} | {one.what} |")
    return "\n".join(rows)


def table(name: str) -> str:
    """What stands between the marks of one table."""
    section, _, kind = name.partition(".")
    if name == "objectives":
        return objectives()
    if section in ("mixers", "ffns"):
        return options({"mixers": MIXERS, "ffns": FFNS}[section].load(kind))
    sections: dict[str, type[BaseModel]] = {
        "scale": Scale, "trunk": Trunk, "task": settings.Task, "train": settings.Train, "search": settings.Search,
        "runtime": settings.Runtime, "goal": settings.Goal, "at": settings.Workload, "share.kv": share.ShareKV,
        "share.weights": share.ShareWeights,
    }  # fmt: skip
    return options(sections[name])


def written(text: str) -> str:
    """The page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    sys.exit()

TEXT = PAGE.read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
BASE = """
archsearch: 1
name: example
scales:
  proxy: {n_blocks: 12, d_model: 128, context: 256}
  target: {n_blocks: 24, d_model: 256, context: 4096}
mixers:
  full: {kind: attention, head_dim: 32}
  gdn: {kind: gated_deltanet, head_dim: 32}
  swa: {kind: attention, head_dim: 32, window: 1/4 context}
ffns:
  dense: {kind: swiglu}
  moe: {kind: moe}
layout: {mixer: {pattern: [gdn, gdn, gdn, full]}, ffn: {pattern: [dense, moe]}}
"""


def section_of(title: str) -> str:
    """A chapter of the page, with its parts."""
    return re.split(r"^## ", TEXT.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """What the first column of a hand-written table names."""
    rows = re.findall(r"^\| (`.*?) \|", TABLE.sub("", text), flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_the_tables_are_those_of_the_code() -> None:
    assert written(TEXT) == TEXT, "run: python tests/test_language.py"


def test_every_kind_has_its_table() -> None:
    tables = [name for _, name, _ in TABLE.findall(TEXT)]
    assert sorted(name for name in tables if name.startswith("mixers.")) == sorted(f"mixers.{k}" for k in MIXERS.table)
    assert sorted(name for name in tables if name.startswith("ffns.")) == sorted(f"ffns.{k}" for k in FFNS.table)
    assert {"scale", "trunk", "task", "train", "search", "runtime", "goal", "at", "objectives"} < set(tables)
    assert len(set(tables)) == len(tables)


def test_every_section_is_named_with_what_it_may_hold() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (yes|no) \|", section_of("Sections"), flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == list(sections.SECTIONS)
    assert {name for name, required, _ in rows if required == "yes"} == set(sections.REQUIRED)
    assert {name for name, _, holes in rows if holes == "yes"} == set(sections.WITH_HOLES)


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_are_spaces(text: str) -> None:
    tree = yaml.safe_load(text)
    whole = tree if "archsearch" in tree else {**yaml.safe_load(BASE), **tree}
    for alphabet in {"mixers", "ffns"} & (set() if "archsearch" in tree else set(tree)):
        whole[alphabet] = {**yaml.safe_load(BASE)[alphabet], **tree[alphabet]}
    loaded = SearchSpace.from_text(yaml.safe_dump(whole, sort_keys=False))
    refusals = [loaded.refusal(loaded.sample(RandomChooser(seed))) for seed in range(20)]
    assert None in refusals, refusals[0]


def test_the_numbers_are_read_as_the_page_says() -> None:
    readers = {
        "count": quantity.parse_count, "size": quantity.parse_bytes, "duration": quantity.parse_seconds,
        "number": quantity.parse_number, "span": quantity.parse_span,
    }  # fmt: skip
    rows = re.findall(r"^\| (\w+) \| (.*?) \| (.*?) \|", section_of("Numbers"), flags=re.MULTILINE)
    rows = [row for row in rows if row[0] in readers]
    assert {row[0] for row in rows} == set(readers)
    for what, examples, read_as in rows:
        texts, values = re.findall(r"`([^`]+)`", examples), re.findall(r"`([^`]+)`", read_as)
        assert len(texts) == len(values) >= 3, what
        for text, value in zip(texts, values, strict=True):
            assert readers[what](yaml.safe_load(text)) == yaml.safe_load(value), f"{what} {text}"


def test_holes_and_layouts_are_all_there() -> None:
    assert first_cells(section_of("Holes")) == [*(f"{{{kind}: {args}}}" for kind, args in zip(
        HOLES, ("[a, b, ...]", "[low, high, step]", "[low, high]"), strict=True,
    ))]  # fmt: skip
    assert all(f"`per: {what}`" in section_of("Holes") for what in PER)
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section_of("layout"), flags=re.MULTILINE)
    assert {form: {form, *re.findall(r"`(\w+)`", keys)} for form, keys in rows} == layout.KEYS
    places = section_of("layout").partition("A place is one of ")[2].partition(":")[0]
    assert re.findall(r"`(\w+)`", places) == list(layout.PLACES)


def test_the_rule_language_is_all_there() -> None:
    text = section_of("rules")
    functions = [name.partition("(")[0].partition("[")[0] for name in first_cells(text)]
    assert functions == [*rules.LAYOUT_FUNCTIONS, *rules.LISTS, *rules.COST_FUNCTIONS]
    for function, allowed in rules.COST_FUNCTIONS.items():
        (shown,) = re.findall(rf"^\| `{function}\(([^`]*)\)`", text, flags=re.MULTILINE)
        assert re.findall(r"(\w+)=", shown) == list(allowed)
    units = text.partition("Units are ")[2].partition(";")[0]
    assert set(re.findall(r"`(\w+)`", units)) == set(rules.UNITS)
    (listed,) = [example for example in EXAMPLES if example.startswith("rules:")]
    assert len(yaml.safe_load(listed)["rules"]) >= 6
