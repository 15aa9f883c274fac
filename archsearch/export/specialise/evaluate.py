"""What an expression can be where it stands; see `analysis.py`."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archsearch.export.source import all_names, children
from archsearch.export.specialise.facts import Notes
from archsearch.export.specialise.program import Procedure
from archsearch.export.specialise.values import (
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
    from archsearch.export.specialise.analysis import Analysis


@dataclass(frozen=True)
class Slot:
    """What a local name holds; `raw`: perhaps still what the caller passed."""

    value: Value
    raw: bool = False


Env = dict[str, Slot]

RULES: dict[type[ast.expr], str] = {  # an expression of another type is some object
    ast.Constant: "_constant",
    ast.Name: "_name",
    ast.Attribute: "_attribute",
    ast.Call: "call",
    ast.IfExp: "_either",
    ast.BoolOp: "_bool_op",
    ast.UnaryOp: "_unary",
    ast.BinOp: "_binary",
    ast.Compare: "_compare",
    ast.Subscript: "_subscript",
    ast.Tuple: "_display",
    ast.List: "_display",
    ast.Set: "_display",
    ast.ListComp: "_comprehension",
    ast.GeneratorExp: "_comprehension",
    ast.SetComp: "_comprehension",
    ast.DictComp: "_comprehension",
    ast.NamedExpr: "_walrus",
    ast.Lambda: "_lambda",
    ast.Starred: "_anything",
    ast.Await: "_anything",
}


def is_self(node: ast.expr) -> bool:
    """Whether this is the name `self`."""
    return isinstance(node, ast.Name) and node.id == "self"


class Evaluator(ABC):
    """Evaluates expressions of one procedure in the environment `env`, and binds names in it."""

    def __init__(self, analysis: Analysis, procedure: Procedure) -> None:
        self.analysis = analysis
        self.program = analysis.program
        self.procedure = procedure
        self.env: Env = {}
        self.notes = Notes()

    @abstractmethod
    def call(self, node: ast.Call) -> Value:
        """What a call gives; its callee is told what it gets."""

    def _test(self, node: ast.expr) -> frozenset[bool]:
        """The outcomes of an expression whose truth is asked for."""
        return self._tested(node)[1]

    def _tested(self, node: ast.expr) -> tuple[Value, frozenset[bool]]:
        """An expression's value, and the outcomes of asking for its truth."""
        value, truths = self._and_or(node) if isinstance(node, ast.BoolOp) else self._value_and_truths(node)
        self.notes.truths[node] = self.notes.truths.get(node, truths) | truths
        return value, truths

    def _value_and_truths(self, node: ast.expr) -> tuple[Value, frozenset[bool]]:
        value = self.evaluate(node)
        truths = value.truths
        if truths == BOTH and isinstance(node, ast.BinOp | ast.Compare):
            truths = self._one_by_one(node)
        return value, truths

    def _one_by_one(self, node: ast.expr) -> frozenset[bool]:
        """The outcomes of a test on a single name, tried with each of the name's constants: `c & (c - 1)`."""
        names = all_names(node)
        slot = self.env.get(next(iter(names))) if len(names) == 1 else None
        if slot is None or not slot.value.constants:
            return BOTH
        before, (name,) = self.env, names
        outcomes: frozenset[bool] = frozenset()
        for constant in slot.value.constants:
            self.env = {**before, name: Slot(literal(constant.value), slot.raw)}
            outcomes |= self.evaluate(node).truths
        self.env = before
        return outcomes

    def evaluate_outside(self, node: ast.expr) -> Value:
        """A default value, which is evaluated where no local name is known."""
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError):
            return OBJECT
        return OBJECT if isinstance(value, list | dict | set) else literal(value)

    def evaluate(self, node: ast.expr) -> Value:
        """What the expression can be; everything in it counts as read."""
        rule = RULES.get(type(node))
        if rule is not None:
            value: Value = getattr(self, rule)(node)
            return value
        values = [self.evaluate(child) for child in children(node) if isinstance(child, ast.expr)]
        return NOTHING if NOTHING in values else OBJECT

    def _constant(self, node: ast.Constant) -> Value:
        return literal(node.value)

    def _either(self, node: ast.IfExp) -> Value:
        truths = self._test(node.test)
        body = self.evaluate(node.body) if True in truths else NOTHING
        return body | (self.evaluate(node.orelse) if False in truths else NOTHING)

    def _unary(self, node: ast.UnaryOp) -> Value:
        if isinstance(node.op, ast.Not):
            return booleans(not t for t in self._test(node.operand))
        value = self.evaluate(node.operand)
        return binary(ast.Sub(), literal(0), value) if isinstance(node.op, ast.USub) else OBJECT

    def _binary(self, node: ast.BinOp) -> Value:
        return binary(node.op, self.evaluate(node.left), self.evaluate(node.right))

    def _walrus(self, node: ast.NamedExpr) -> Value:
        value = self.evaluate(node.value)
        self._store(node.target, value)
        return value

    def _lambda(self, node: ast.Lambda) -> Value:
        before, names = self.env, [a.arg for a in node.args.args]
        self.env = {**self.env, **{n: Slot(ANY) for n in names}}
        self.evaluate(node.body)
        self.env = before
        return OBJECT

    def _anything(self, node: ast.Starred | ast.Await) -> Value:
        self.evaluate(node.value)
        return ANY

    def _noted(self, node: ast.expr, value: Value) -> Value:
        self.notes.values[node] = self.notes.values.get(node, NOTHING) | value
        return value

    def _name(self, node: ast.Name) -> Value:
        return self._noted(node, self._named_value(node))

    def _named_value(self, node: ast.Name) -> Value:
        if (slot := self.env.get(node.id)) is not None:
            if slot.raw:
                self.notes.read_parameters.add((self.procedure, node.id))
            return slot.value
        outer = self.procedure.outer
        while outer is not None:
            if self.analysis.holds(outer, node.id):
                self.notes.read_parameters.add((outer, node.id))
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
        return self._noted(node, self._attribute_value(node))

    def _attribute_value(self, node: ast.Attribute) -> Value:
        if is_self(node.value) and self.procedure.cls is not None:
            owners = [self.procedure.cls]
        else:
            owner = self.evaluate(node.value)
            if owner == NOTHING:
                return NOTHING
            if owner.atoms is None or not all(isinstance(a, Instance) for a in owner.atoms):
                self._note_attribute(None, node.attr)
                self._method_escapes(node.attr, list(self.program.classes))
                return ANY
            owners = [a.cls for a in owner.atoms if isinstance(a, Instance) and a.cls in self.program.classes]
            if not owners:
                return ANY
        self._method_escapes(node.attr, owners)
        for cls in owners:
            self._note_attribute(cls, node.attr)
        return join(self.analysis.attribute(cls, node.attr) for cls in owners)

    def _note_attribute(self, cls: str | None, name: str) -> None:
        """An attribute is read, of this class or of one we cannot tell."""
        if cls is not None:
            self.notes.read_attributes.add((cls, name))
        else:
            self.notes.read_attributes.update((owner, name) for owner in self.program.classes)

    def _method_escapes(self, name: str, classes: list[str]) -> None:
        """A method named without being called."""
        for cls in classes:
            method = self.program.method(cls, name)
            if method is not None and "property" not in method.decorators:
                self.analysis.escape(method)
            elif method is not None:
                self.analysis.enter(method)

    def _bool_op(self, node: ast.BoolOp) -> Value:
        return self._and_or(node)[0]

    def _and_or(self, node: ast.BoolOp) -> tuple[Value, frozenset[bool]]:
        """Value and truth; the truth is known more often, as `x and False` is false whatever x is."""
        goes_on = isinstance(node.op, ast.And)
        out, outcomes = NOTHING, set[bool]()
        for operand in node.values:
            value, truths = self._tested(operand)
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
            if len(key.constants) == len(entries) == 1:
                self.notes.chosen[node] = entries[0]
            return join(self.evaluate(e) for e in entries)
        value = self.evaluate(node.value)
        if isinstance(node.slice, ast.Slice):
            return sequence(value.elements) if value.length is not None else value
        is_tensor = isinstance(node.slice, ast.Tuple)
        return OBJECT if is_tensor else value.elements

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
        if any(isinstance(e, ast.Starred) for e in node.elts):
            return sequence(ANY)
        return sequence(join(parts), len(parts) if isinstance(node, ast.Tuple) else None)

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


def sequence(elements: Value, length: int | None = None) -> Value:
    """A list of such elements; lists of lists are only objects."""
    if elements.atoms is not None and any(isinstance(a, Sequence) for a in elements.atoms):
        return OBJECT
    return Value(frozenset({Sequence(elements, length)}))
