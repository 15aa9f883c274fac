"""What a space's file must look like before any hole is filled: its sections, names, objectives, rules and holes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from archsearch.errors import DataError, UserError, one_of
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.objectives import OBJECTIVES, Objective
from archsearch.quantity import parse_bound
from archsearch.settings import Goal, Task
from archsearch.space.explain import Problems, key_hint
from archsearch.space.holes import HoleError, check_hole, find_holes, is_hole
from archsearch.space.rules import COST_FUNCTIONS, Rule, RuleError, parse_rule
from archsearch.space.yaml_source import Path_

FORMAT = 1
WITH_HOLES = ("scales", "mixers", "ffns", "trunk", "layout", "share", "train")
SECTIONS = ("archsearch", "name", "description", "task", *WITH_HOLES, "rules", "objectives", "search", "runtime")
REQUIRED = ("archsearch", "name", "scales", "mixers", "ffns", "layout")
DEFAULT_OBJECTIVES = (Goal(name="val_bpb"), Goal(name="decode_ms"))
BYTE_VOCAB = 257
_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_STUDY_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


def check_sections(tree: Any, problems: Problems) -> None:
    """Which sections there are, and the names that the file gives."""
    if not isinstance(tree, dict):
        kind = {"list": "a list", "str": "plain text"}.get(type(tree).__name__, "a single value")
        problems.add((), f"the file is {kind}; expected a mapping with all of {', '.join(REQUIRED)}")
        return
    for key in tree:
        if key not in SECTIONS:
            problems.add((key,), f"is no section; expected {one_of(SECTIONS)}.{key_hint(key, SECTIONS)}")
    for key in REQUIRED:
        if key not in tree:
            hint = f"; write 'archsearch: {FORMAT}' as the first line" if key == "archsearch" else ""
            problems.add((), f"the section '{key}' is missing{hint}")
    if tree.get("archsearch", FORMAT) != FORMAT:
        problems.add(("archsearch",), f"is {tree['archsearch']!r}; this version reads format {FORMAT}")
    name = tree.get("name", "a")
    if not (isinstance(name, str) and _STUDY_NAME.match(name)):
        hint = "" if isinstance(name, str) else "; YAML reads no text here: write it in quotes"
        problems.add(("name",), f"is {name!r}; expected letters, digits, dots, dashes and underscores{hint}")
    if not isinstance(tree.get("description", ""), str):
        problems.add(("description",), "is no text")
    for section in ("mixers", "ffns"):
        if section in tree:
            _check_alphabet(section, tree, problems)


def _check_alphabet(section: str, tree: dict[str, Any], problems: Problems) -> None:
    alphabet, mixers = tree[section], tree.get("mixers")
    if not isinstance(alphabet, dict) or not alphabet or is_hole(alphabet):
        problems.add((section,), "is no alphabet; expected names with their options, such as full: {kind: attention}")
        return
    for name in alphabet:
        if not _NAME.match(name):
            problems.add((section, name), "is no name; expected letters, digits and underscores")
        if section == "ffns" and isinstance(mixers, dict) and name in mixers:
            problems.add((section, name), "names a mixer already; mixers and ffns need different names")


def read_vocab_size(task: Task, base_dir: Path, problems: Problems) -> int:
    """The tokenizer's, or that of the token ids that the corpus is; a corpus that is not there is told later."""
    if task.tokenizer == "bytes" and task.corpus == Task().corpus:
        return BYTE_VOCAB
    from archsearch.data import holds_tokens, vocab_size

    if task.tokenizer == "bytes" and not holds_tokens(task.corpus, base_dir):
        return BYTE_VOCAB
    try:
        return vocab_size(task, base_dir)
    except DataError as error:
        problems.add(("task",), f"cannot be used: {error}")
        return BYTE_VOCAB


def read_objectives(tree: dict[str, Any], problems: Problems) -> tuple[Goal, ...]:
    """The `objectives` section, or what stands in its place."""
    listed = tree.get("objectives")
    if listed is None:
        return DEFAULT_OBJECTIVES
    if not isinstance(listed, list) or not listed:
        problems.add(
            ("objectives",), f"is {listed!r}; expected a list such as [{{name: val_bpb}}, {{name: decode_ms}}]"
        )
        return DEFAULT_OBJECTIVES
    goals: dict[int, Goal] = {}
    for i, node in enumerate(listed):
        node = {"name": node} if isinstance(node, str) else node
        goal = problems.validate(Goal, _in_unit(node, problems, ("objectives", i, "limit")), ("objectives", i))
        if goal is None:
            continue
        if goal in goals.values():
            problems.add(("objectives", i), f"repeats '{goal.name}'")
        goals[i] = goal
        try:
            unit = OBJECTIVES.load(goal.name).unit
        except UserError as error:
            problems.add(("objectives", i, "name"), str(error).replace("unknown objective ", "is ", 1))
            continue
        if goal.name in OBJECTIVES.table and goal.limit is not None and goal.limit <= 0:
            problems.add(("objectives", i, "limit"), f"is {goal.limit:g}; expected a number above 0, in {unit}")
    if not problems.found and any(goal.at.device for goal in goals.values()):
        _check_devices(goals, problems)
    return tuple(goals.values())


def _in_unit(node: Any, problems: Problems, path: Path_) -> Any:
    """A goal whose limit is written with a unit (`5 ms`, `1 GiB`, `20M`), with the number in the objective's own."""
    limit = node.get("limit") if isinstance(node, dict) else None
    if not isinstance(limit, str):
        return node
    try:
        unit = OBJECTIVES.load(node.get("name")).unit
    except UserError:  # told of the name
        return {**node, "limit": None}
    try:
        return {**node, "limit": parse_bound(limit, unit)}
    except ValueError as error:
        problems.add(path, str(error).replace("found ", "is ", 1))
        return {**node, "limit": None}


def _check_devices(goals: dict[int, Goal], problems: Problems) -> None:
    """All measured objectives name a device, or none does."""
    for i, goal in goals.items():
        found: Objective = OBJECTIVES.load(goal.name)
        is_measured = found.stage == "bench"
        if goal.at.device and not is_measured:
            problems.add(("objectives", i, "at", "device"), f"is of no use: {goal.name} is not measured on a device")
        if is_measured and not goal.at.device:
            why = "others do, and latencies of different devices do not compare"
            problems.add(("objectives", i, "at"), f"names no device; {why}")


def read_rules(tree: dict[str, Any], problems: Problems) -> tuple[Rule, ...]:
    """The `rules` section. Rules may speak of the file's own names and of all kinds, plug-ins included."""
    listed = tree.get("rules", [])
    if not isinstance(listed, list):
        problems.add(("rules",), f"is {listed!r}; expected a list such as ['count(full) >= 1']")
        return ()
    names = {*tree["mixers"], *tree["ffns"], *MIXERS.names(), *FFNS.names()}
    rules = []
    for i, text in enumerate(listed):
        try:
            rules.append(parse_rule(text, names))
        except RuleError as error:
            cut = isinstance(text, str) and text.count("(") != text.count(")")
            hint = "; in a [...] list, quote rules that hold a comma" if cut else _objective_in(text)
            problems.add(("rules", i), f"cannot be read: {str(error).rstrip('.') if hint else error}{hint}")
    return tuple(rules)


def _objective_in(rule: object) -> str:
    """Where what is measured may be bounded, if that is what a rule speaks of."""
    words = re.findall(r"\w+", rule) if isinstance(rule, str) else []
    found = [word for word in words if word in OBJECTIVES.table and word not in COST_FUNCTIONS]
    return f"; to bound an objective, give it a limit: {{name: {found[0]}, limit: ...}}" if found else ""


def check_holes(tree: dict[str, Any], problems: Problems) -> bool:
    """Whether all holes are well formed and stand where holes may."""
    before = len(problems.found)
    for path in find_holes(tree):
        if path[0] not in WITH_HOLES:
            problems.add(path, f"is a hole; holes may stand in {one_of(WITH_HOLES)}")
            continue
        node: Any = tree
        for part in path:
            node = node[part]
        try:
            check_hole(node, path)
        except HoleError as error:
            problems.add(error.path, str(error))
    return len(problems.found) == before
