"""One function read statement by statement with possibilities instead of values; see `analysis.py`."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from archsearch.export.specialise.calls import Caller
from archsearch.export.specialise.evaluate import Env, Slot
from archsearch.export.specialise.program import Procedure
from archsearch.export.specialise.values import ANY, BOTH, OBJECT, Instance, Sequence, Value, literal

if TYPE_CHECKING:
    from archsearch.export.specialise.analysis import Analysis


class Interpreter(Caller):
    """Reads the body of one procedure once, and tells the analysis what it does.

    Statements take the environment before them and give the one after, or None if it is never reached.
    """

    def __init__(self, analysis: Analysis, procedure: Procedure) -> None:
        super().__init__(analysis, procedure)
        self._loops: list[list[Env]] = []

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
                self.notes.results[node] = self.procedure
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

    def _assign(self, target: ast.expr, value: ast.expr, known: Value | None = None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            values = [self.evaluate(v) for v in value.elts]
            for part, one in zip(target.elts, values, strict=True):
                self._store(part, one)
        else:
            found = self.evaluate(value)
            self._store(target, found if known is None else known)

    def _annotated(self, annotation: ast.expr) -> Value | None:
        """`list[Block]` says what the list will hold."""
        if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Name):
            cls = annotation.slice.id
            if cls in self.program.classes and ast.unparse(annotation.value) == "list":
                return Value(frozenset({Sequence(Value(frozenset({Instance(cls)})))}))
        return None


def _meet(ways: list[Env | None]) -> Env | None:
    """The environment after several ways of getting here."""
    open_ways = [way for way in ways if way is not None]
    if not open_ways:
        return None
    out = dict(open_ways[0])
    for way in open_ways[1:]:
        for name, slot in way.items():
            mine = out.get(name)
            if mine is None:
                out[name] = slot
            elif mine is not slot:
                out[name] = Slot(mine.value | slot.value, mine.raw or slot.raw)
    return out
