"""Python source with its syntax tree: where a node stands in the text, and edits that leave the rest as it was.

Comments, blank lines and line breaks are part of how code reads and are not in the tree, so the exporter never prints
a tree: it replaces stretches of text. (libcst would do the same with one more dependency and three times the time.)
"""

from __future__ import annotations

import ast
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import accumulate, zip_longest
from typing import Any, TypeVar

Function = ast.FunctionDef | ast.AsyncFunctionDef
Block = tuple[ast.AST, list[ast.stmt]]
Node = TypeVar("Node", bound=ast.AST)
Found = TypeVar("Found")
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True, order=True)
class Edit:
    """Replace text[start:end] by `new`."""

    start: int
    end: int
    new: str

    @property
    def growth(self) -> int:
        """Characters that the text gains."""
        return len(self.new) - (self.end - self.start)


def _kept(find: Callable[[Node], Found]) -> Callable[[Node], Found]:
    """What is found out about a node stays with it: nodes move over to edited texts, but never change."""
    name = find.__name__

    @wraps(find)
    def kept(node: Node) -> Found:
        known = node.__dict__
        if name not in known:
            known[name] = find(node)
        found: Found = known[name]
        return found

    return kept


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_CAPTURES = (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
_OUTER = (ast.Global, ast.Nonlocal)
_NO_NODES = {"ctx", "op", "ops", "id", "attr", "arg", "asname", "module", "level", "kind", "conversion", "type_comment"}


class Part:
    """A statement at the top of a text, and what can be told of it wherever it stands."""

    def __init__(self, statement: ast.stmt) -> None:
        self.statement = statement

    @property
    def last_line(self) -> int:
        """The line, from 1, on which it ends."""
        assert self.statement.end_lineno is not None
        return self.statement.end_lineno

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """The statement and everything below it, in the order of the text."""
        return walk(self.statement)

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        """The node above each node but the statement."""
        return {child: node for node in self.nodes for child in children(node)}

    @cached_property
    def by_kind(self) -> dict[type[ast.AST], list[Any]]:
        """The nodes, sorted by what they are."""
        found: dict[type[ast.AST], list[Any]] = defaultdict(list)
        for node in self.nodes:
            found[node.__class__].append(node)
        return dict(found)

    @cached_property
    def blocks(self) -> list[Block]:
        """Every list of statements in it, with the node that holds it."""
        found: list[Block] = []
        todo: list[ast.AST] = [self.statement]
        while todo:
            node = todo.pop()
            for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
                if block:
                    found.append((node, block))
                    todo += block
            todo += [*getattr(node, "handlers", ()), *getattr(node, "cases", ())]
        return found

    def moved(self, lines: int) -> Part:
        """The same part, further down by that many lines."""
        for node in self.nodes if lines else ():
            if node._attributes:  # it has a place in the text
                node.lineno += lines  # type: ignore[attr-defined]
                node.end_lineno += lines  # type: ignore[attr-defined]
        return self


class Source:
    """A text, its tree, and the way from one to the other."""

    def __init__(self, text: str, parts: list[Part] | None = None) -> None:
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self.parts = parts or [Part(statement) for statement in ast.parse(text).body]
        self.tree = ast.Module([part.statement for part in self.parts], [])
        self._line_starts = [0, *accumulate(map(len, self.lines))]

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        """The node above each node."""
        found: dict[ast.AST, ast.AST] = dict.fromkeys(self.tree.body, self.tree)
        for part in self.parts:
            found.update(part.parents)
        return found

    def nodes(self, top: ast.AST) -> list[ast.AST]:
        """The node and everything below it, in the order of the text."""
        return walk(top)

    def of_kind(self, kind: type[Node], top: ast.stmt | None = None) -> list[Node]:
        """Every node of one kind in the text, or in a statement at its top."""
        parts = self.parts if top is None else [part for part in self.parts if part.statement is top]
        return [node for part in parts for node in part.by_kind.get(kind, ())]

    @cached_property
    def blocks(self) -> list[Block]:
        """Every list of statements, with the node that holds it; the module's first."""
        return [(self.tree, self.tree.body), *(block for part in self.parts for block in part.blocks)]

    def edited(self, edits: Iterable[Edit]) -> Source:
        """The source with every edit made (see `apply`).

        Statements at the top without an edit are not parsed again, they move over: of no more use in this source.
        """
        todo = deque(_chosen(edits))
        text = _applied(self.text, todo)
        parts: list[Part] = []
        stretch: list[Part] = []
        at = new_at = longer = 0  # where the stretch begins in the old text and in the new one
        line = new_line = 0
        for part, following in zip_longest(self.parts, self.parts[1:]):
            stretch.append(part)
            end = len(self.text) if following is None else self._line_starts[part.last_line]
            while todo and todo[0].end <= end:
                longer += todo.popleft().growth
            shares_line = following is not None and following.statement.lineno == part.last_line
            if shares_line or (todo and todo[0].start < end):
                continue  # one stretch with the next part
            old, new = self.text[at:end], text[new_at : end + longer]
            if old == new:
                parts += [kept.moved(new_line - line) for kept in stretch]
            else:
                parts += [Part(statement).moved(new_line) for statement in ast.parse(new).body]
            at, new_at, stretch = end, end + longer, []
            line, new_line = line + old.count("\n"), new_line + new.count("\n")
        return Source(text, parts)

    def offset(self, line: int, column: int) -> int:
        """Index in the text of a position as ast counts it (lines from 1, columns in UTF-8 bytes)."""
        if line > len(self.lines):
            return len(self.text)
        text = self.lines[line - 1]
        if not text.isascii():
            column = len(text.encode()[:column].decode())
        return self._line_starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Start and end of a node, without parentheses around it."""
        at = node
        assert isinstance(at, ast.expr | ast.stmt | ast.arg | ast.keyword | ast.alias | ast.excepthandler)
        assert at.end_lineno is not None
        assert at.end_col_offset is not None
        return self.offset(at.lineno, at.col_offset), self.offset(at.end_lineno, at.end_col_offset)

    def segment(self, node: ast.AST) -> str:
        """The text of a node."""
        start, end = self.span(node)
        return self.text[start:end]

    def wrapped_span(self, node: ast.expr) -> tuple[int, int]:
        """The span with the parentheses that group exactly this expression, if there are any."""
        start, end = self.span(node)
        low, high = self._inside(self.parents[node], node)
        while True:
            left = _skip_back(self.text, start)
            right = _skip_on(self.text, end)
            if left <= low or right >= high or self.text[left - 1] != "(" or self.text[right] != ")":
                return start, end
            start, end = left - 1, right + 1

    def _inside(self, parent: ast.AST, node: ast.expr) -> tuple[int, int]:
        """Where the parent's own brackets cannot be: a call's begin after its function."""
        if isinstance(parent, ast.Call) and node is not parent.func:
            after = self.span(parent.func)[1]
            return self.text.index("(", after) + 1, self.span(parent)[1] - 1
        if isinstance(parent, ast.keyword):
            call = self.parents[parent]
            return self.span(parent)[0], self.span(call)[1] - 1
        if isinstance(parent, ast.comprehension | ast.arguments | ast.withitem | ast.Slice):
            return self._inside(self.parents[parent], node)
        return self.span(parent) if hasattr(parent, "lineno") else (0, len(self.text))

    def statement_lines(self, node: ast.stmt) -> tuple[int, int]:
        """First and last line (from 1) of a statement with its decorators and the comments right above it."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        while first > 1 and self._is_comment(first - 1, node.col_offset):
            first -= 1
        assert node.end_lineno is not None
        return first, node.end_lineno

    def body_lines(self, body: list[ast.stmt]) -> tuple[int, int]:
        """First and last line of a block, comments above and below its statements included."""
        first, last = self.statement_lines(body[0])[0], self.statement_lines(body[-1])[1]
        while last < len(self.lines) and self._is_comment(last + 1, body[0].col_offset):
            last += 1
        return first, last

    def _is_comment(self, line: int, indent: int) -> bool:
        text = self.lines[line - 1]
        return text.lstrip().startswith("#") and len(text) - len(text.lstrip()) == indent

    def line_text(self, first: int, last: int) -> str:
        """Lines first to last, both included."""
        return "".join(self.lines[first - 1 : last])

    def line_span(self, first: int, last: int) -> tuple[int, int]:
        """Start and end in the text of lines first to last."""
        return self._line_starts[first - 1], self._line_starts[last]

    @cached_property
    def lines_in_strings(self) -> set[int]:
        """Lines that begin inside a string which is not a docstring, so that their indentation means something."""
        found: set[int] = set()
        texts = [node for node in self.of_kind(ast.Constant) if isinstance(node.value, str)]
        for node in (*texts, *self.of_kind(ast.JoinedStr)):
            if not isinstance(self.parents[node], ast.Expr):
                assert node.end_lineno is not None
                found.update(range(node.lineno + 1, node.end_lineno + 1))
        return found


def _skip_back(text: str, at: int) -> int:
    while at > 0 and text[at - 1].isspace():
        at -= 1
    return at


def _skip_on(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def apply(text: str, edits: Iterable[Edit]) -> str:
    """The text with every edit made. What lies inside of a larger edit goes with it; deletions may overlap."""
    return _applied(text, _chosen(edits))


def _chosen(edits: Iterable[Edit]) -> list[Edit]:
    """Those to make, in the order of the text, none inside of another."""
    chosen: list[Edit] = []
    for edit in sorted(set(edits), key=lambda e: (e.start, -e.end)):
        last = chosen[-1] if chosen else None
        if last is None or edit.start >= last.end:
            chosen.append(edit)
        elif edit.end > last.end:
            assert edit.new == last.new == "", f"{edit} and {last} overlap"
            chosen[-1] = Edit(last.start, edit.end, "")
    return chosen


def _applied(text: str, chosen: Iterable[Edit]) -> str:
    out, at = [], 0
    for edit in chosen:
        out += [text[at : edit.start], edit.new]
        at = edit.end
    return "".join([*out, text[at:]])


def literal_text(value: object) -> str:
    """A literal as the formatter writes it: strings in double quotes."""
    text = repr(value)
    if isinstance(value, str) and '"' not in value and "'" not in value:
        return f'"{text[1:-1]}"'
    return text


@_kept
def children(node: ast.AST) -> list[ast.AST]:
    """The nodes right below a node, in the order of the text; `ast.iter_child_nodes` without operators, faster."""
    found: list[ast.AST] = []
    for name in node._fields:
        value = None if name in _NO_NODES else getattr(node, name, None)
        if value.__class__ is list:
            found += [item for item in value if isinstance(item, ast.AST)]
        elif isinstance(value, ast.AST):
            found.append(value)
    return found


def walk(top: ast.AST) -> list[ast.AST]:
    """The node and everything below it, in the order of the text."""
    found = []
    todo = [top]
    while todo:
        node = todo.pop()
        found.append(node)
        todo += reversed(children(node))
    return found


@_kept
def bound_names(scope: Function | ast.Lambda) -> set[str]:
    """Names local to a function: parameters and whatever is assigned in it, nested functions' own names excepted."""
    a = scope.args
    names = {arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if arg is not None}
    outer: set[str] = set()
    todo: list[ast.AST] = list(scope.body) if isinstance(scope.body, list) else [scope.body]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                names.add(node.id)
            continue
        if isinstance(node, _DEFINITIONS):
            names.add(node.name)
            continue
        if isinstance(node, _IMPORTS):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, _CAPTURES) and node.name:
            names.add(node.name)
        elif isinstance(node, _OUTER):
            outer.update(node.names)
        elif isinstance(node, (ast.Lambda, *_COMPREHENSIONS)):
            todo += [n for n in walk(node) if isinstance(n, ast.NamedExpr)]
            continue
        todo.extend(children(node))
    return names - outer


@_kept
def all_names(top: ast.AST) -> set[str]:
    """All names below a node, be they read or set."""
    return {node.id for node in walk(top) if isinstance(node, ast.Name)}


@_kept
def read_names(scope: Function) -> set[str]:
    """Names that a function or one inside of it reads, or shares with what is outside."""
    found: set[str] = set()
    for node in walk(scope):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, _OUTER):
            found.update(node.names)
    return found


@_kept
def global_names(top: ast.AST) -> set[str]:
    """The names of `global_reads`."""
    return {node.id for node in global_reads(top)}


def global_reads(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Name nodes below `node` that refer to the module's globals (or builtins), annotations included."""
    if isinstance(node, ast.Name):
        if node.id not in local:
            yield node
        return
    if isinstance(node, SCOPES):
        for outside in _outside(node):
            yield from global_reads(outside, local)
        inner = local | bound_names(node)
        body: list[ast.stmt] | list[ast.expr] = node.body if isinstance(node.body, list) else [node.body]
        for inside in body:
            yield from global_reads(inside, inner)
        return
    if isinstance(node, _COMPREHENSIONS):
        targets = [n for g in node.generators for n in ast.walk(g.target)]
        local = local | {n.id for n in targets if isinstance(n, ast.Name)}
    for child in children(node):
        yield from global_reads(child, local)


def _outside(function: Function | ast.Lambda) -> Iterator[ast.AST]:
    """Parts of a function that are evaluated outside of it: decorators, defaults, annotations."""
    a = function.args
    yield from (d for d in [*a.defaults, *a.kw_defaults] if d is not None)
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    yield from (arg.annotation for arg in every if arg is not None and arg.annotation is not None)
    if not isinstance(function, ast.Lambda):
        yield from function.decorator_list
        if function.returns is not None:
            yield function.returns
