"""One function read statement by statement with possibilities instead of values; see `analysis.py`."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archsearch.export.program import Procedure
from archsearch.export.values import (
    ANY,
    BOTH,
    NOTHING,
    OBJECT,
    Const,
    Instance,
    Sequence,
    Value,
    binary,
    booleans,
    compare,
    join,
    literal,
)

if TYPE_CHECKING:
    from archsearch.export.analysis import Analysis

CONTAINERS = ("nn.ModuleList", "nn.Sequential")
PASS_ELEMENTS_ON = ("list", "tuple", "reversed", "sorted")
MAYBE_NONE = ("get", "pop", "getattr", "next")  # calls from outside whose result can be None


@dataclass(frozen=True)
class Slot:
    """What a local name holds; `raw`: perhaps still what the caller passed."""

    value: Value
    raw: bool = False


Env = dict[str, Slot]


def is_self(node: ast.expr) -> bool:
    """Whether this is the name `self`."""
    return isinstance(node, ast.Name) and node.id == "self"


class Interpreter:
    """Reads the body of one procedure once, and tells the analysis what it does."""

    def __init__(self, analysis: Analysis, procedure: Procedure) -> None:
        self.analysis = analysis
        self.program = analysis.program
        self.procedure = procedure
        self._loops: list[list[Env]] = []
        self._arguments: dict[ast.expr, Value] = {}
        self.env: Env = {}

    def run(self) -> None:
        """From the parameters to the returns."""
        for parameter in self.procedure.parameters:
            value = self.analysis.parameter(self.procedure, parameter.arg)
            self.env[parameter.arg] = Slot(value, raw=True)
            self.analysis.hold(self.procedure, parameter.arg, value)
        a = self.procedure.node.args
        if self.procedure.cls is not None and self.procedure.is_bound:
            me = Value(frozenset({Instance(self.procedure.cls)}))
            self._bind(a.args[0].arg, OBJECT if self._is_classmethod else me)
        for extra in (a.vararg, a.kwarg):
            if extra is not None:
                self._bind(extra.arg, ANY)
        if self._block(self.procedure.node.body, self.env) is not None:
            self.analysis.return_value(self.procedure, literal(None))

    # --- statements: each takes the environment before it and gives the one after, or None if it never gets there ---

    def _block(self, body: list[ast.stmt], env: Env | None) -> Env | None:
        for statement in body:
            if env is None:
                return None
            env = self._statement(statement, env)
        return env

    def _statement(self, node: ast.stmt, env: Env) -> Env | None:
        self.env = env = dict(env)
        match node:
            case ast.Assign():
                for target in node.targets:
                    self._assign(target, node.value)
            case ast.AnnAssign():
                if node.value is not None:
                    self._assign(node.target, node.value, self._annotated(node.annotation))
            case ast.AugAssign():
                self.evaluate(node.value)
                self.evaluate(node.target)
                self._store(node.target, OBJECT)
            case ast.Expr():
                self.evaluate(node.value)
            case ast.Return():
                value = literal(None) if node.value is None else self.evaluate(node.value)
                self.analysis.return_value(self.procedure, value)
                if self.analysis.recording:
                    self.analysis.notes.results[node] = self.procedure
                return None
            case ast.Raise() | ast.Assert() | ast.Delete():
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr) and not isinstance(node, ast.Delete):
                        self.evaluate(child)
                return None if isinstance(node, ast.Raise) else env
            case ast.If():
                truths = self._test(node.test)
                ways = [self._block(node.body, env)] if True in truths else []
                ways += [self._block(node.orelse, env)] if False in truths else []
                return _meet(ways)
            case ast.For() | ast.AsyncFor() | ast.While():
                return self._loop(node, env)
            case ast.Break() | ast.Continue():
                self._loops[-1].append(env)
                return None
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    self.evaluate(item.context_expr)
                    if item.optional_vars is not None:
                        self._store(item.optional_vars, ANY)
                return self._block(node.body, env)
            case ast.Try():
                after = self._block(node.body, env)
                start = _meet([env, after])
                ways = [self._block(node.orelse, after)]
                ways += [self._block(handler.body, self._named(handler, start)) for handler in node.handlers]
                return self._block(node.finalbody, _meet(ways)) if node.finalbody else _meet(ways)
            case ast.Match():
                self.evaluate(node.subject)
                ways = []
                for case in node.cases:
                    here = dict(env)
                    here.update(
                        {n.name: Slot(ANY) for n in ast.walk(case.pattern) if isinstance(n, ast.MatchAs) and n.name}
                    )
                    ways.append(self._block(case.body, here))
                return _meet([env, *ways])
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._bind(node.name, OBJECT)
        return self.env

    def _named(self, handler: ast.ExceptHandler, env: Env | None) -> Env | None:
        return None if env is None else {**env, **({handler.name: Slot(OBJECT)} if handler.name else {})}

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While, env: Env) -> Env | None:
        self._loops.append([])
        truths = BOTH
        while True:
            self.env = dict(env)
            if isinstance(node, ast.While):
                truths = self._test(node.test)
            else:
                self._bind_loop(node.target, node.iter)
            inside = dict(self.env)
            after = self._block(node.body, inside) if True in truths else None
            grown = _meet([env, after, *self._loops[-1]])
            assert grown is not None
            if grown == env:
                break
            env = grown
        self._loops.pop()
        return self._block(node.orelse, env)

    def _bind_loop(self, target: ast.expr, iterable: ast.expr) -> None:
        """`for target in iterable`; enumerate and zip give their parts to the parts of the target."""
        if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) and isinstance(target, ast.Tuple):
            if iterable.func.id == "enumerate" and len(target.elts) == 2:
                self._store(target.elts[0], OBJECT)
                return self._store(target.elts[1], self.evaluate(iterable.args[0]).elements)
            if iterable.func.id == "zip" and len(target.elts) == len(iterable.args):
                for part, source in zip(target.elts, iterable.args, strict=True):
                    self._store(part, self.evaluate(source).elements)
                return None
        return self._store(target, self.evaluate(iterable).elements)

    def _assign(self, target: ast.expr, value: ast.expr, known: Value | None = None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            values = [self.evaluate(v) for v in value.elts]
            for part, one in zip(target.elts, values, strict=True):
                self._store(part, one)
        else:
            found = self.evaluate(value)
            self._store(target, found if known is None else known)

    def _store(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name():
                self._bind(target.id, value)
            case ast.Tuple() | ast.List():
                for part in target.elts:
                    self._store(part, value.elements)
            case ast.Starred():
                self._store(target.value, ANY)
            case ast.Attribute() if is_self(target.value) and self.procedure.cls is not None:
                self.analysis.set_attribute(self.procedure.cls, target.attr, value)
            case ast.Attribute():
                owner = self.evaluate(target.value)
                classes = (
                    [a.cls for a in owner.atoms if isinstance(a, Instance)] if owner.atoms else self.program.classes
                )
                for cls in classes:
                    self.analysis.set_attribute(cls, target.attr, value)
            case _:
                for child in ast.iter_child_nodes(target):
                    if isinstance(child, ast.expr):
                        self.evaluate(child)

    def _bind(self, name: str, value: Value) -> None:
        self.env[name] = Slot(value)
        self.analysis.hold(self.procedure, name, value)

    def _annotated(self, annotation: ast.expr) -> Value | None:
        """`list[Block]` says what the list will hold."""
        if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Name):
            cls = annotation.slice.id
            if cls in self.program.classes and ast.unparse(annotation.value) == "list":
                return Value(frozenset({Sequence(Value(frozenset({Instance(cls)})))}))
        return None

    # --- expressions ---

    def _test(self, node: ast.expr) -> frozenset[bool]:
        """The outcomes of an expression whose truth is asked for."""
        truths = self._and_or(node)[1] if isinstance(node, ast.BoolOp) else self.evaluate(node).truths
        if self.analysis.recording:
            notes = self.analysis.notes.truths
            notes[node] = notes.get(node, frozenset()) | truths
        return truths

    def argument(self, node: ast.expr) -> Value:
        """The value of an argument of the call that is being bound."""
        return ANY if isinstance(node, ast.Starred) else self._arguments[node]

    def evaluate_outside(self, node: ast.expr) -> Value:
        """A default value, which is evaluated where no local name is known."""
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError):
            return OBJECT
        return OBJECT if isinstance(value, list | dict | set) else literal(value)

    def evaluate(self, node: ast.expr) -> Value:
        """What the expression can be; everything in it counts as read."""
        match node:
            case ast.Constant():
                return literal(node.value)
            case ast.Name():
                return self._noted(node, self._name(node))
            case ast.Attribute():
                return self._noted(node, self._attribute(node))
            case ast.Call():
                return self._call(node)
            case ast.IfExp():
                truths = self._test(node.test)
                body = self.evaluate(node.body) if True in truths else NOTHING
                return body | (self.evaluate(node.orelse) if False in truths else NOTHING)
            case ast.BoolOp():
                return self._and_or(node)[0]
            case ast.UnaryOp(op=ast.Not()):
                return booleans(not t for t in self._test(node.operand))
            case ast.UnaryOp(op=ast.USub()):
                return binary(ast.Sub(), literal(0), self.evaluate(node.operand))
            case ast.BinOp():
                return binary(node.op, self.evaluate(node.left), self.evaluate(node.right))
            case ast.Compare():
                return self._compare(node)
            case ast.Subscript():
                return self._subscript(node)
            case ast.Tuple() | ast.List() | ast.Set():
                return self._display(node)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
                return self._comprehension(node)
            case ast.NamedExpr():
                value = self.evaluate(node.value)
                self._store(node.target, value)
                return value
            case ast.Lambda():
                before, names = self.env, [a.arg for a in node.args.args]
                self.env = {**self.env, **{n: Slot(ANY) for n in names}}
                self.evaluate(node.body)
                self.env = before
                return OBJECT
        values = [self.evaluate(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return ANY if isinstance(node, ast.Starred | ast.Await) else NOTHING if NOTHING in values else OBJECT

    def _noted(self, node: ast.expr, value: Value) -> Value:
        if self.analysis.recording:
            notes = self.analysis.notes.values
            notes[node] = notes.get(node, NOTHING) | value
        return value

    def _name(self, node: ast.Name) -> Value:
        if (slot := self.env.get(node.id)) is not None:
            if slot.raw and self.analysis.recording:
                self.analysis.notes.read_parameters.add((self.procedure, node.id))
            return slot.value
        outer = self.procedure.outer
        while outer is not None:
            if self.analysis.holds(outer, node.id):
                if self.analysis.recording:
                    self.analysis.notes.read_parameters.add((outer, node.id))
                return self.analysis.held_value(outer, node.id)
            outer = outer.outer
        if node.id in self.program.functions:
            self.analysis.escape(self.program.functions[node.id])
        elif node.id in self.program.classes:
            self.analysis.escape_class(node.id)
        elif node.id in self.program.globals:
            return self.evaluate_outside(self.program.globals[node.id])
        return OBJECT

    def _attribute(self, node: ast.Attribute) -> Value:
        if is_self(node.value) and self.procedure.cls is not None:
            owners = [self.procedure.cls]
        else:
            owner = self.evaluate(node.value)
            if owner == NOTHING:
                return NOTHING
            if owner.atoms is None or not all(isinstance(a, Instance) for a in owner.atoms):
                self.analysis.note_attribute(None, node.attr)
                self._method_escapes(node.attr, list(self.program.classes))
                return ANY
            owners = [a.cls for a in owner.atoms if isinstance(a, Instance) and a.cls in self.program.classes]
            if not owners:
                return ANY
        self._method_escapes(node.attr, owners)
        for cls in owners:
            self.analysis.note_attribute(cls, node.attr)
        return join(self.analysis.attribute(cls, node.attr) for cls in owners)

    def _method_escapes(self, name: str, classes: list[str]) -> None:
        """A method named without being called."""
        for cls in classes:
            method = self.program.method(cls, name)
            if method is not None and "property" not in method.decorators:
                self.analysis.escape(method)
            elif method is not None:
                self.analysis.enter(method)

    def _and_or(self, node: ast.BoolOp) -> tuple[Value, frozenset[bool]]:
        """Value and truth; the truth is known more often, as `x and False` is false whatever x is."""
        goes_on = isinstance(node.op, ast.And)
        out, outcomes = NOTHING, set[bool]()
        for operand in node.values:
            truths = self._test(operand)
            value = self.evaluate(operand)
            if operand is node.values[-1]:
                return out | value, frozenset(outcomes | truths)
            if (not goes_on) in truths:
                stays = value.atoms and {a for a in value.atoms if not isinstance(a, Const) or bool(a.value) != goes_on}
                out = out | (value if value.atoms is None else Value(frozenset(stays or ())))
                outcomes.add(not goes_on)
            if goes_on not in truths:
                break
        return out, frozenset(outcomes)

    def _compare(self, node: ast.Compare) -> Value:
        values = [self.evaluate(v) for v in (node.left, *node.comparators)]
        return compare(node.ops[0], *values) if len(values) == 2 else OBJECT

    def _subscript(self, node: ast.Subscript) -> Value:
        table = self._table(node.value)
        key = self.evaluate(node.slice)
        if key == NOTHING:
            return NOTHING
        if table is not None and key.constants:
            entries = [table[k.value] for k in key.constants if k.value in table]
            if self.analysis.recording and len(key.constants) == len(entries) == 1:
                self.analysis.notes.chosen[node] = entries[0]
            return join(self.evaluate(e) for e in entries)
        value = self.evaluate(node.value)
        return value if isinstance(node.slice, ast.Slice) else value.elements

    def _table(self, node: ast.expr) -> dict[object, ast.expr] | None:
        """The entries of a dict display with literal keys."""
        if not isinstance(node, ast.Dict) or not all(isinstance(k, ast.Constant) for k in node.keys):
            return None
        return {k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}

    def _display(self, node: ast.Tuple | ast.List | ast.Set) -> Value:
        parts = [self.evaluate(e) for e in node.elts]
        constants = [p.constant for p in parts]
        if all(c is not None for c in constants) and not isinstance(node, ast.List):
            return literal(tuple(c.value for c in constants if c is not None))
        return sequence(ANY if any(isinstance(e, ast.Starred) for e in node.elts) else join(parts))

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> Value:
        before = self.env
        self.env = dict(before)
        for generator in node.generators:
            self._bind_loop(generator.target, generator.iter)
            for test in generator.ifs:
                self._test(test)
        if isinstance(node, ast.DictComp):
            self.evaluate(node.key)
            self.evaluate(node.value)
            out = OBJECT
        else:
            out = sequence(self.evaluate(node.elt))
        self.env = before
        return out

    # --- calls ---

    def _call(self, node: ast.Call) -> Value:
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
            self.analysis.note_attribute(None, node.args[1].value)
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
        root = receiver
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id not in self.env and self._is_outside_name(root.id):
            return self._outside(node, ast.unparse(func))
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
        self.analysis.note_attribute(None, name)
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
                self.analysis.note_attribute(cls, func.attr)
                value = self.analysis.attribute(cls, func.attr)
                self._noted(func, value)
                out = out | self.analysis.call_object(node, value, self)
            else:
                out = out | OBJECT
        return out


def sequence(elements: Value) -> Value:
    """A list of such elements; lists of lists of lists are only objects."""
    if elements.atoms is not None and any(isinstance(a, Sequence) for a in elements.atoms):
        return OBJECT
    return Value(frozenset({Sequence(elements)}))


def _meet(ways: list[Env | None]) -> Env | None:
    """The environment after several ways of getting here."""
    open_ways = [way for way in ways if way is not None]
    if not open_ways:
        return None
    out = dict(open_ways[0])
    for way in open_ways[1:]:
        for name, slot in way.items():
            mine = out.get(name, Slot(NOTHING))
            out[name] = Slot(mine.value | slot.value, mine.raw or slot.raw)
    return out
