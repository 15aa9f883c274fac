"""Which values can reach which place of a model's code: constant propagation over the whole file.

All calls of a function are taken together, so a parameter's value is the join of what is passed anywhere; what a
`self.x` can be is the join of everything assigned to it. Functions are interpreted statement by statement, again
whenever something that they read has changed; what the last reading of each has noted are the `Facts`.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from typing import Any

from archsearch.export.specialise.calls import Caller
from archsearch.export.specialise.evaluate import is_self
from archsearch.export.specialise.facts import Attribute, Call, Facts, Notes
from archsearch.export.specialise.interpret import Interpreter
from archsearch.export.specialise.program import TRANSPARENT, Procedure, Program
from archsearch.export.specialise.values import ANY, NOTHING, OBJECT, Const, Instance, Value, join

Place = tuple[str, Any, str]  # kind, owner, name

DEEPEST = 16  # calls inside of calls that are followed at once, as Python's stack has an end


class Analysis:
    """Run it by `facts()`. `entries` are the classes and functions that the outside calls."""

    def __init__(self, program: Program, entries: frozenset[str]) -> None:
        self.program = program
        self._facts = Facts()
        self._notes: dict[Procedure, Notes] = {}  # of the last reading of each
        self.is_opaque = "setattr(" in program.source.text  # attributes may change where we cannot see
        self._known: dict[Place, Value] = {}
        self._readers: dict[Place, set[Procedure]] = defaultdict(set)
        self._running: list[Procedure] = []  # the last one has been called by the one before it
        self._waiting: dict[Procedure, None] = {}  # in order
        self._assigned = self._assigned_attributes()
        for name in program.classes.keys() & entries:
            self._make(name)
        for procedure in program.procedures():
            if self._is_entry(procedure, entries):
                self.escape(procedure)

    def facts(self) -> Facts:
        """Interpret until nothing changes any more."""
        while self._waiting:
            self._run(next(iter(self._waiting)))
        for procedure in self.program.procedures():
            if procedure in self._notes:
                self._facts.add(self._notes[procedure])
        self._facts.read_attributes = {
            (owner, name) for cls, name in self._facts.read_attributes for owner in self.program.relatives(cls)
        }
        for (kind, owner, name), value in self._known.items():
            if kind == "attribute":
                self._facts.attributes[owner, name] = value
            elif kind == "parameter":
                self._facts.parameters[owner, name] = value
        return self._facts

    def _run(self, procedure: Procedure) -> None:
        self._waiting.pop(procedure, None)
        interpreter = Interpreter(self, procedure)
        self._notes[procedure] = interpreter.notes
        self._running.append(procedure)
        interpreter.run()
        self._running.pop()

    def _is_entry(self, procedure: Procedure, entries: frozenset[str]) -> bool:
        name = procedure.node.name
        special = name.startswith("__") and name.endswith("__") and name != "__init__"
        outside = procedure.cls is not None and not self.program.classes[procedure.cls].is_module
        known = procedure.decorators <= set(TRANSPARENT)
        return (procedure.cls or procedure.name) in entries or special or outside or not known

    # --- what is known so far ---

    def _read(self, kind: str, owner: Any, name: str) -> Value:
        """What is known of a place; whoever runs now is run again when more is known."""
        if self._running:
            self._readers[kind, owner, name].add(self._running[-1])
        return self._known.get((kind, owner, name), NOTHING)

    def _grow(self, kind: str, owner: Any, name: str, value: Value) -> None:
        place = (kind, owner, name)
        before = self._known.get(place)
        after = value if before is None else before | value
        if after != before:
            self._known[place] = after
            for reader in self._readers[place]:
                self._waiting[reader] = None

    def enter(self, procedure: Procedure) -> None:
        """The procedure runs."""
        if procedure not in self._facts.reached:
            self._facts.reached.add(procedure)
            self._waiting[procedure] = None

    def escape(self, procedure: Procedure) -> None:
        """The procedure may be called from where we cannot see, with anything."""
        self.enter(procedure)
        for parameter in procedure.parameters:
            self._grow("parameter", procedure, parameter.arg, ANY)
            self._facts.fixed.add((procedure, parameter.arg))

    def escape_class(self, name: str) -> None:
        """A class is used other than by calling it: all its methods escape."""
        self._make(name)
        for method in self.program.classes[name].methods.values():
            self.escape(method)

    def parameter(self, procedure: Procedure, name: str) -> Value:
        """What callers pass."""
        return self._read("parameter", procedure, name)

    def return_value(self, procedure: Procedure, value: Value) -> None:
        """A return gives `value`."""
        self._grow("result", procedure, "", value)

    def hold(self, procedure: Procedure, name: str, value: Value) -> None:
        """A local name is bound to `value`; functions inside may read it at any time."""
        if procedure.inner:
            self._grow("local", procedure, name, value)

    def holds(self, procedure: Procedure, name: str) -> bool:
        """Whether the name is local to a procedure with functions inside."""
        self._read("local", procedure, name)  # to be run again once it is
        return ("local", procedure, name) in self._known

    def held_value(self, procedure: Procedure, name: str) -> Value:
        """Everything that a local name ever holds."""
        return self._read("local", procedure, name)

    def set_attribute(self, cls: str, name: str, value: Value) -> None:
        """`self.name` of `cls` is set to `value`."""
        self._grow("attribute", cls, name, value)

    def attribute(self, cls: str, name: str) -> Value:
        """What `self.name` can be in `cls`; anything if nobody is seen to set it."""
        if self.is_opaque or not self.is_assigned(cls, name):
            return ANY
        return join(self._read("attribute", c, name) for c in self.program.relatives(cls))

    def is_assigned(self, cls: str, name: str) -> bool:
        """Whether some method sets `self.name`."""
        return (cls, name) in self._assigned

    def _assigned_attributes(self) -> set[Attribute]:
        found: set[Attribute] = set()
        for cls in self.program.classes.values():
            for node in self.program.source.of_kind(ast.Attribute, cls.node):
                if isinstance(node.ctx, ast.Store) and is_self(node.value):
                    found.add((cls.name, node.attr))
            found -= {(cls.name, name) for name in _class_level_names(cls.node)}
        return {(relative, name) for cls, name in found for relative in self.program.relatives(cls)}

    # --- calls ---

    def bind(self, node: ast.Call, procedure: Procedure, at: Caller) -> Value:
        """One possible callee of a call: passes the arguments, gives what it returns."""
        if any(isinstance(a, ast.Starred) and at.argument(a) == NOTHING for a in node.args):
            return NOTHING  # nothing is known yet of what is passed
        filled = self._filled(node, procedure, at)
        if any(p.arg not in filled and p.arg not in procedure.defaults for p in procedure.parameters):
            return NOTHING  # this call cannot be one of that function
        self.enter(procedure)
        for parameter, default in procedure.defaults.items():
            argument = filled.get(parameter)
            if argument is None or (isinstance(argument, ast.Starred) and at.length(argument) is None):
                self._grow("parameter", procedure, parameter, at.evaluate_outside(default))
                self._facts.defaulted.add((procedure, parameter))
        for parameter, argument in filled.items():
            self._grow("parameter", procedure, parameter, at.argument(argument))
        call = at.notes.calls.setdefault(node, Call(node))
        call.arguments[procedure] = filled
        at.notes.starred.update((procedure, p) for p, a in filled.items() if isinstance(a, ast.Starred))
        if procedure not in self._notes and len(self._running) < DEEPEST:
            self._run(procedure)  # so that its caller need not be read again for what it gives
        return self._read("result", procedure, "")

    @staticmethod
    def _filled(node: ast.Call, procedure: Procedure, at: Caller) -> dict[str, ast.expr]:
        """Argument by parameter; a starred one of unknown length may fill any that follows, or none."""
        filled: dict[str, ast.expr] = {}
        left = [p.arg for p in procedure.positional]
        for argument in node.args:
            n = 1
            if isinstance(argument, ast.Starred):
                length = at.length(argument)
                n = len(left) if length is None else length
            filled.update(dict.fromkeys(left[:n], argument))
            left = left[n:]
        names = {p.arg for p in procedure.parameters}
        for keyword in node.keywords:
            if keyword.arg is None:
                anything = ast.Starred(keyword.value, ast.Load())
                filled.update((n, anything) for n in names - filled.keys())
            elif keyword.arg in names:
                filled[keyword.arg] = keyword.value
        return filled

    def _make(self, cls: str) -> None:
        """There are objects of the class, so methods called on self may be its own."""
        self._grow("made", cls, "", OBJECT)

    def made(self, cls: str) -> list[str]:
        """What `self` can be in a method of `cls`: the classes with objects among it and its heirs."""
        return [heir for heir in self.program.heirs(cls) if self._read("made", heir, "") != NOTHING]

    def construct(self, node: ast.Call, cls: str, at: Caller) -> Value:
        """`Class(...)` of a copied class."""
        self._make(cls)
        init = self.program.method(cls, "__init__")
        if init is not None:
            self.bind(node, init, at)
        return Value(frozenset({Instance(cls)}))

    def call_object(self, node: ast.Call, value: Value, at: Caller) -> Value:
        """`value(...)`: runs `forward` of whatever module it can be."""
        if value == NOTHING:
            return NOTHING
        if value.atoms is not None and all(isinstance(a, Instance | Const) for a in value.atoms):
            out = NOTHING
            for atom in value.atoms:
                if isinstance(atom, Instance):
                    out = out | self._forward(node, atom.cls, at)
            return out
        forwards = [f for f in self.program.methods_named("forward") if self.program.classes[f.cls or ""].is_module]
        for forward in forwards:
            self.bind(node, forward, at)
        return ANY

    def _forward(self, node: ast.Call, cls: str, at: Caller) -> Value:
        if cls == "nn.Identity":
            return at.argument(node.args[0])
        forward = self.program.method(cls, "forward")
        return OBJECT if forward is None else self.bind(node, forward, at)


def _class_level_names(node: ast.ClassDef) -> set[str]:
    """Names bound in the class body: fields and defaults, which an instance may or may not hide."""
    targets = [t for c in node.body if isinstance(c, ast.Assign) for t in c.targets]
    targets += [c.target for c in node.body if isinstance(c, ast.AnnAssign) and c.value is not None]
    return {t.id for t in targets if isinstance(t, ast.Name)}
