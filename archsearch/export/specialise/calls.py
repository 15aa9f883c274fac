"""Calls: whom they may reach, and what is passed; see `analysis.py`."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from archsearch.export.specialise.evaluate import Evaluator, is_self, sequence
from archsearch.export.specialise.program import Procedure
from archsearch.export.specialise.values import ANY, NOTHING, OBJECT, Instance, Sequence, Value, join, literal

if TYPE_CHECKING:
    from archsearch.export.specialise.analysis import Analysis

CONTAINERS = ("nn.ModuleList", "nn.Sequential")
PASS_ELEMENTS_ON = ("list", "tuple", "reversed", "sorted")
MAYBE_NONE = ("get", "pop", "getattr", "next")  # calls from outside whose result can be None


class Caller(Evaluator):
    """An evaluator that follows calls into copied code."""

    def __init__(self, analysis: Analysis, procedure: Procedure) -> None:
        super().__init__(analysis, procedure)
        self._arguments: dict[ast.expr, Value] = {}

    def argument(self, node: ast.expr) -> Value:
        """The value of an argument of the call that is being bound; of `*values`, of each of them."""
        value = self._arguments.get(node, ANY)
        return value.elements if isinstance(node, ast.Starred) else value

    def length(self, node: ast.Starred) -> int | None:
        """How many arguments `*values` stands for, if that is known."""
        return self._arguments.get(node, ANY).length

    def call(self, node: ast.Call) -> Value:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            self.evaluate(node.args[0])
            return OBJECT
        for argument in [*node.args, *(k.value for k in node.keywords)]:
            inner = argument.value if isinstance(argument, ast.Starred) else argument
            self._arguments[argument] = self.evaluate(inner)
        return self._called(node, node.func)

    @property
    def _is_classmethod(self) -> bool:
        return "classmethod" in self.procedure.decorators

    def _called(self, node: ast.Call, func: ast.expr) -> Value:
        match func:
            case ast.Name(id="cls") if self._is_classmethod and self.procedure.cls is not None:
                return self.analysis.construct(node, self.procedure.cls, self)
            case ast.Name() if func.id not in self.env or self._inner(func.id) is not None:
                inner = self._inner(func.id)
                if inner is not None:
                    return self.analysis.bind(node, inner, self)
                if func.id in self.program.functions:
                    return self.analysis.bind(node, self.program.functions[func.id], self)
                if func.id in self.program.classes:
                    return self.analysis.construct(node, func.id, self)
                return self._outside(node, func.id)
            case ast.Attribute():
                return self._method_call(node, func)
        return self.analysis.call_object(node, self.evaluate(func), self)

    def _inner(self, name: str) -> Procedure | None:
        procedure: Procedure | None = self.procedure
        while procedure is not None:
            if name in procedure.inner:
                return procedure.inner[name]
            procedure = procedure.outer
        return None

    def _outside(self, node: ast.Call, name: str) -> Value:
        """A call of torch, Python or anything else that is not copied."""
        if name in CONTAINERS or name in PASS_ELEMENTS_ON:
            return sequence(self.argument(node.args[0]).elements) if len(node.args) == 1 else OBJECT
        if name in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
            attribute = str(node.args[1].value)
            self._note_attribute(None, attribute)
            self._method_escapes(attribute, list(self.program.classes))
        for argument in node.args:
            for atom in self.argument(argument).atoms or ():
                if isinstance(atom, Instance) and atom.cls in self.program.classes:
                    self.analysis.escape_class(atom.cls)
        last = name.rpartition(".")[2]
        if name.startswith("nn.") and last[0].isupper() and last != "Parameter":
            return Value(frozenset({Instance(name)}))
        return ANY if last in MAYBE_NONE else OBJECT

    def _method_call(self, node: ast.Call, func: ast.Attribute) -> Value:
        name, receiver = func.attr, func.value
        if isinstance(receiver, ast.Call) and isinstance(receiver.func, ast.Name) and receiver.func.id == "super":
            assert self.procedure.cls is not None
            bases = self.program.lineage(self.procedure.cls)[1:]
            found = [m for c in bases[:1] if (m := self.program.method(c, name)) is not None]
            return join(self.analysis.bind(node, m, self) for m in found) if found else OBJECT
        if is_self(receiver) and self.procedure.cls is not None:
            return self._call_on(node, func, [self.procedure.cls])
        root, path = receiver, [name]
        while isinstance(root, ast.Attribute):
            path.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name) and root.id not in self.env and self._is_outside_name(root.id):
            return self._outside(node, ".".join([root.id, *reversed(path)]))
        owner = self.evaluate(receiver)
        if owner == NOTHING:
            return NOTHING
        is_list = owner.atoms is not None and all(isinstance(a, Sequence) for a in owner.atoms)
        if is_list and name in ("append", "extend") and isinstance(receiver, ast.Name):
            added = self.argument(node.args[0])
            self._bind(receiver.id, owner | sequence(added if name == "append" else added.elements))
            return literal(None)
        if owner.atoms is not None and all(isinstance(a, Instance) for a in owner.atoms):
            return self._call_on(node, func, [a.cls for a in owner.atoms if isinstance(a, Instance)])
        methods = self.program.methods_named(name)
        self._note_attribute(None, name)
        found_results = [self.analysis.bind(node, m, self) for m in methods]
        return ANY if found_results or name in MAYBE_NONE else OBJECT

    def _is_outside_name(self, name: str) -> bool:
        tables = (self.program.functions, self.program.classes, self.program.globals)
        outer = self.procedure.outer
        while outer is not None:
            if self.analysis.holds(outer, name):
                return False
            outer = outer.outer
        return not any(name in table for table in tables)

    def _call_on(self, node: ast.Call, func: ast.Attribute, classes: list[str]) -> Value:
        """`object.name(...)` where the object's classes (or classes it inherits from) are known."""
        out = NOTHING
        for cls in classes:
            methods = {self.program.method(c, func.attr) for c in self.analysis.made(cls)} - {None}
            if methods:
                out = out | join(self.analysis.bind(node, m, self) for m in methods if m is not None)
            elif self.analysis.is_assigned(cls, func.attr):
                self._note_attribute(cls, func.attr)
                value = self.analysis.attribute(cls, func.attr)
                self._noted(func, value)
                out = out | self.analysis.call_object(node, value, self)
            else:
                out = out | OBJECT
        return out
