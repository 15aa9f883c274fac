"""Reads a YAML file into plain data that remembers its lines, and refuses what is not plain data.

Refused with file and line: tags (Python objects among them), duplicate keys, keys that are no strings, files over
1 MB, nesting deeper than 40, aliases that expand to more than 20,000 nodes (bombs) or into themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from archsearch.errors import SpaceError

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_NODES = 20_000
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPENING = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_CLOSING = (yaml.MappingEndEvent, yaml.SequenceEndEvent)
_ODD_SPACES = re.compile(r"[\u00a0\u2000-\u200b\u202f\u3000]")
_AS_TEXT = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:binary")

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """A parsed file: `tree` of dicts, lists and scalars; `lines` maps the path of each node to its line (from 1)."""

    name: str
    text: str
    tree: Any
    lines: dict[Path_, int]

    def line(self, path: Path_) -> int:
        """The line of a node, or of the nearest node above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def where(self, path: Path_) -> str:
        """`space.yaml:14`, as messages begin."""
        return f"{self.name}:{self.line(path)}"


def read_yaml(path: Path) -> Source:
    """Parse the file at `path`; raises SpaceError with file and line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SpaceError(f"{path}: no such file") from None
    except OSError as error:
        raise SpaceError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise SpaceError(f"{path}: {len(data):,} bytes; a search space has at most {MAX_BYTES:,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse_yaml(text, path.name)


def parse_yaml(text: str, name: str = "space.yaml") -> Source:
    """Parse YAML text; `name` stands in messages. Raises SpaceError."""
    try:
        _refuse_hostile(text, name)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{name}:{mark.line + 1}" if mark else name
        problem = error.problem or error.context
        if mark and _starts_with_tab(text, mark.line):
            problem = "found a tab; YAML indents with spaces alone"
        elif mark and (odd := _odd_space(text, mark.line)) is not None:
            at, problem = f"{name}:{odd + 1}", "found a no-break space, which YAML takes for a letter; type a plain one"
        elif problem == "could not find expected ':'":
            at = f"{name}:{error.context_mark.line + 1}" if error.context_mark else at
            problem += "; write a colon and a space after a key"
        elif problem == "but found another document":
            problem = "found a second document after '---'; a space is one"
        elif problem == "did not find expected key":
            problem += "; indent this line as those it belongs to, and close what was opened above"
        raise SpaceError(f"{at}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise SpaceError(f"{name}: not valid YAML: {error}") from None
    if root is None:
        raise SpaceError(f"{name}: the file is empty; see search_spaces/quickstart.yaml for one to start from")
    builder = _Builder(name)
    tree = builder.build(root, ())
    return Source(name, text, tree, builder.lines)


def _odd_space(text: str, line: int) -> int | None:
    """The last line (from 0) up to the one that YAML stumbled over with a space that is none to it, if there is any."""
    return max((i for i, each in enumerate(text.splitlines()[: line + 1]) if _ODD_SPACES.search(each)), default=None)


def _starts_with_tab(text: str, line: int) -> bool:
    """Whether the line (from 0) that YAML stumbled over holds a tab before its first word."""
    stumbled = text.splitlines()[line : line + 1]
    return any("\t" in each[: len(each) - len(each.lstrip())] for each in stumbled)


def _refuse_hostile(text: str, name: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, _OPENING):
            depth += 1
            if depth > MAX_DEPTH:
                raise SpaceError(f"{name}:{line}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, _CLOSING):
            depth -= 1
        if (tag := getattr(event, "tag", None)) is not None:
            raise SpaceError(f"{name}:{line}: found the tag {tag!r}; a search space is plain data without tags")


class _Builder:
    """YAML nodes to plain data; counts expanded nodes, notes lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Path_, int] = {}
        self.count = 0
        self.open: set[int] = set()
        self.scalars = yaml.SafeLoader("")

    def build(self, node: yaml.Node, path: Path_) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self.count += 1
        if self.count > MAX_NODES:
            raise SpaceError(f"{self.name}:{line}: aliases expand to more than {MAX_NODES:,} nodes")
        if isinstance(node, yaml.ScalarNode):
            return node.value if node.tag in _AS_TEXT else self._scalar(node, line)
        if id(node) in self.open:
            raise SpaceError(f"{self.name}:{line}: an alias contains itself")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self.open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        try:
            return self.scalars.construct_object(node)
        except (ValueError, yaml.YAMLError):
            raise SpaceError(f"{self.name}:{line}: cannot read the value {node.value!r}") from None

    def _mapping(self, node: yaml.Node, path: Path_) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or key_node.tag == "tag:yaml.org,2002:merge":
                found = repr(key) if isinstance(key, str) else "a list or mapping"
                raise SpaceError(f"{self.name}:{line}: found {found} as a key; expected a plain word")
            if key in made:
                raise SpaceError(f"{self.name}:{line}: the key '{key}' appears twice")
            self.lines[(*path, key)] = line
            made[key] = self.build(value_node, (*path, key))
        return made
