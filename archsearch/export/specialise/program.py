"""The functions and classes of one module by name: who has which methods, parameters and base classes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from archsearch.export.source import Function, Source

TRANSPARENT = (
    "no_grad",
    "inference_mode",
    "staticmethod",
    "classmethod",
    "property",
    "cache",
    "lru_cache",
    "dataclass",
)


@dataclass(eq=False)
class Procedure:
    """A function or method. `name` is `function`, `Class.method` or `outer.<inner>`."""

    name: str
    node: Function
    cls: str | None = None
    outer: Procedure | None = None
    inner: dict[str, Procedure] = field(default_factory=dict)

    @cached_property
    def decorators(self) -> set[str]:
        """Last names of the decorators."""
        found = (d.func if isinstance(d, ast.Call) else d for d in self.node.decorator_list)
        return {ast.unparse(d).rpartition(".")[2] for d in found}

    @cached_property
    def is_bound(self) -> bool:
        """Whether the first parameter is filled by the attribute access."""
        return self.cls is not None and "staticmethod" not in self.decorators

    @cached_property
    def positional(self) -> list[ast.arg]:
        """Parameters that a call can fill by position, `self` left out."""
        args = [*self.node.args.posonlyargs, *self.node.args.args]
        return args[1:] if self.is_bound else args

    @cached_property
    def parameters(self) -> list[ast.arg]:
        """All parameters but `self`, *args and **kwargs."""
        return [*self.positional, *self.node.args.kwonlyargs]

    @cached_property
    def defaults(self) -> dict[str, ast.expr]:
        """Default by parameter."""
        a = self.node.args
        positional = [*a.posonlyargs, *a.args]
        found = dict(zip((p.arg for p in reversed(positional)), reversed(a.defaults), strict=False))
        found.update((p.arg, d) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is not None)
        return found


@dataclass(eq=False)
class Class:
    """A class, its own methods and the names of its bases."""

    name: str
    node: ast.ClassDef
    bases: list[str]
    methods: dict[str, Procedure] = field(default_factory=dict)

    @property
    def is_module(self) -> bool:
        """Whether calling an instance runs `forward`: true of everything but plain and autograd classes."""
        return not self.bases or "Function" not in self.bases[0]


class Program:
    """Everything a module defines at its top level."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.functions: dict[str, Procedure] = {}
        self.classes: dict[str, Class] = {}
        self.globals: dict[str, ast.expr] = {}
        self._lineages: dict[str, list[str]] = {}
        self._relatives: dict[str, list[str]] = {}
        self._methods: dict[str, dict[str, Procedure]] = {}
        for node in source.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions[node.name] = _procedure(node.name, node)
            elif isinstance(node, ast.ClassDef):
                cls = self.classes[node.name] = Class(node.name, node, [ast.unparse(b) for b in node.bases])
                for child in node.body:
                    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                        cls.methods[child.name] = _procedure(f"{node.name}.{child.name}", child, node.name)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.globals[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self.globals[node.target.id] = node.value

    def procedures(self) -> Iterator[Procedure]:
        """Every function and method, nested ones after the one they stand in."""
        todo = [*self.functions.values(), *(m for c in self.classes.values() for m in c.methods.values())]
        while todo:
            procedure = todo.pop(0)
            yield procedure
            todo[:0] = procedure.inner.values()

    def lineage(self, cls: str) -> list[str]:
        """The class and the copied classes it inherits from, nearest first."""
        if cls not in self._lineages:
            out: list[str] = []
            todo = [cls]
            while todo:
                name = todo.pop(0)
                if name in self.classes and name not in out:
                    out.append(name)
                    todo += self.classes[name].bases
            self._lineages[cls] = out
        return self._lineages[cls]

    def relatives(self, cls: str) -> list[str]:
        """The class, what it inherits from and what inherits from it: where `self.x` may be set or read."""
        if cls not in self._relatives:
            self._relatives[cls] = [n for n in self.classes if n in self.lineage(cls) or cls in self.lineage(n)]
        return self._relatives[cls]

    def heirs(self, cls: str) -> list[str]:
        """The class and what inherits from it."""
        return [name for name in self.relatives(cls) if cls in self.lineage(name)]

    def method(self, cls: str, name: str) -> Procedure | None:
        """What `instance.name` runs, if the class or a copied base defines it."""
        if cls not in self._methods:
            self._methods[cls] = {}
            for owner in reversed(self.lineage(cls)):
                self._methods[cls].update(self.classes[owner].methods)
        return self._methods[cls].get(name)

    def methods_named(self, name: str) -> list[Procedure]:
        """Every method of that name."""
        return [c.methods[name] for c in self.classes.values() if name in c.methods]


def _procedure(name: str, node: Function, cls: str | None = None, outer: Procedure | None = None) -> Procedure:
    made = Procedure(name, node, cls, outer)
    for child in _nested(node):
        made.inner[child.name] = _procedure(f"{name}.{child.name}", child, None, made)
    return made


def _nested(node: ast.AST) -> Iterator[Function]:
    for name in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, name, ()):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            elif not isinstance(child, ast.ClassDef):
                yield from _nested(child)
