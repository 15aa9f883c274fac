"""One round of rewriting: collects edits of one text that fit together, whatever rule they come from."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Sequence

from archsearch.export.source import Edit, Function, Source, walk
from archsearch.export.specialise.facts import Facts
from archsearch.export.specialise.program import Program
from archsearch.export.specialise.values import Value

ATOMIC = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant, ast.List, ast.Dict, ast.ListComp)
WRITES = ("append", "extend", "insert", "update", "setdefault", "pop", "clear", "register_buffer", "register_parameter")
DRAWS = ("rand", "randn", "randint", "multinomial", "bernoulli", "normal", "print", "manual_seed")


class Rewrite:
    """The edits of a round. Small ones only, so that several rules can work inside the same statement."""

    def __init__(self, source: Source, program: Program, facts: Facts) -> None:
        self.source = source
        self.program = program
        self.facts = facts
        self.touched: set[str] = set()  # functions (`function`, `Class.method`) with an edit inside
        self.dropped: dict[str, dict[str, Value]] = defaultdict(dict)  # parameters and attributes gone, by owner
        self.required: dict[str, set[str]] = defaultdict(set)  # parameters that lost their default, by function
        self._edits: list[Edit] = []
        self._gone: dict[ast.stmt, tuple[int, int]] = {}
        self._dedents: dict[int, int] = defaultdict(int)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be changed."""
        return not self._edits and not self._gone and not self._dedents

    def replace(self, start: int, end: int, new: str = "") -> None:
        """Put `new` in place of a stretch of text."""
        self._edits.append(Edit(start, end, new))

    def replace_node(self, node: ast.expr, new: str) -> None:
        """Put `new`, which needs no parentheses, in place of an expression and the parentheses around it."""
        self.touch(node)
        self.replace(*self.source.wrapped_span(node), new)

    def keep_only(self, node: ast.expr, part: ast.expr) -> None:
        """Leave `part` of an expression, without what was around it."""
        self.touch(node)
        outer, inner = self.source.wrapped_span(node), self.source.span(part)
        has_own = outer != self.source.span(node)
        stays_whole = isinstance(part, ATOMIC) or (self._is_free(node) and "\n" not in self.source.segment(part))
        if not stays_whole and has_own:
            outer = self.source.span(node)
        elif not stays_whole:
            inner = self.source.wrapped_span(part)
        self.replace(outer[0], inner[0])
        self.replace(inner[1], outer[1])

    def _is_free(self, node: ast.expr) -> bool:
        """Whether any expression can stand here without parentheses."""
        parent = self.source.parents[node]
        if isinstance(parent, ast.Call):
            return node is not parent.func
        return isinstance(parent, ast.stmt | ast.keyword | ast.Tuple | ast.List)

    def delete(self, statement: ast.stmt) -> None:
        """Drop a statement and the comment above it."""
        self.touch(statement)
        self._gone[statement] = self.source.line_span(*self.source.statement_lines(statement))

    def is_gone(self, statement: ast.stmt) -> bool:
        """Whether `delete` was called on it."""
        return statement in self._gone

    def delete_lines(self, first: int, last: int) -> None:
        """Drop whole lines."""
        self.replace(*self.source.line_span(first, last))

    def dedent(self, first: int, last: int, by: int) -> None:
        """Move lines to the left; lines inside of strings stay."""
        for line in range(first, last + 1):
            if self.source.lines[line - 1].strip() and line not in self.source.lines_in_strings:
                self._dedents[line] += by

    def drop_items(self, items: Sequence[tuple[int, int]], dropped: Sequence[bool]) -> None:
        """Delete some of the comma-separated items that stand at these spans."""
        kept_end: int | None = None
        for i, (start, end) in enumerate(items):
            if not dropped[i]:
                kept_end = end
            elif not all(dropped[i:]):
                self.replace(start, items[i + 1][0])
            elif kept_end is not None:
                return self.replace(kept_end, items[-1][1])
            else:
                rest = self.source.text[items[-1][1] :]
                return self.replace(start, items[-1][1] + len(rest) - len(rest.lstrip(", \n")))
        return None

    def touch(self, node: ast.AST) -> None:
        """Remember which function is being changed."""
        path: list[str] = []
        at: ast.AST | None = node
        while at is not None:
            if isinstance(at, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                path.insert(0, at.name)
            at = self.source.parents.get(at)
        if path:
            self.touched.add(".".join(path))

    def function_around(self, node: ast.AST) -> Function | None:
        """The innermost function in which a node stands."""
        at: ast.AST | None = node
        while at is not None and not isinstance(at, ast.FunctionDef | ast.AsyncFunctionDef):
            at = self.source.parents.get(at)
        return at

    def result(self) -> Source:
        """The source after the round; a block that lost everything gets a `pass`."""
        filler: dict[ast.stmt, str] = {}
        for owner, block in self.source.blocks:
            if not isinstance(owner, ast.Module) and all(s in self._gone for s in block):
                last = block[-1]
                filler[last] = " " * (last.col_offset - self._dedents.get(last.lineno, 0)) + "pass\n"
        edits = [*self._edits, *(Edit(*span, filler.get(s, "")) for s, span in self._gone.items())]
        for line, by in self._dedents.items():
            start = self.source.line_span(line, line)[0]
            edits.append(Edit(start, start + by, ""))
        return self.source.edited(edits)

    def is_pure(self, node: ast.AST) -> bool:
        """Whether leaving out the expression loses nothing but its value: no call in it writes or draws."""
        for child in walk(node):
            if isinstance(child, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
                return False
            if isinstance(child, ast.Call):
                name = child.func.attr if isinstance(child.func, ast.Attribute) else ast.unparse(child.func)
                ours = isinstance(child.func, ast.Attribute) and bool(self.program.methods_named(name))
                if ours or name.endswith("_") or name in WRITES or name in DRAWS:
                    return False
        return True
