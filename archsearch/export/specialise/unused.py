"""Rules that remove what nobody needs: constant options, unread attributes and locals, unused code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from archsearch.export.source import Function, all_names, global_names, literal_text, read_names
from archsearch.export.specialise.program import Procedure
from archsearch.export.specialise.rewrite import Rewrite
from archsearch.export.specialise.signatures import drop_elements
from archsearch.export.specialise.values import NOTHING, Instance, Value

HOOKS = ("reset_parameters", "update_bias")  # methods that a module may or may not have
IDENTITY = Value(frozenset({Instance("nn.Identity")}))


def drop_unused(rewrite: Rewrite, entries: frozenset[str]) -> None:
    """All rules of this file."""
    _inline_constants(rewrite)
    _skip_identities(rewrite)
    _drop_attributes(rewrite)
    _drop_declarations(rewrite)
    _drop_locals(rewrite)
    _drop_empty_hooks(rewrite)
    _drop_code(rewrite, entries)


def _inline_constants(rewrite: Rewrite) -> None:
    """None, True, False and strings are written out where they are read; numbers keep their names.

    But a factor of 1.0 that others are told (`scale=scale`), which here goes out of every product (`branches.py`).
    """
    in_text = {n for f in rewrite.source.of_kind(ast.JoinedStr) for n in rewrite.source.nodes(f)}
    for node, value in rewrite.facts.values.items():
        constant = value.constant
        if constant is None or node in in_text:
            continue
        is_told = isinstance(node, ast.Name) and isinstance(rewrite.source.parents[node], ast.keyword)
        is_factor = is_told and constant.type == "float" and constant.value == 1.0
        if not is_factor and constant.type not in ("NoneType", "bool", "str"):
            continue
        if isinstance(getattr(node, "ctx", None), ast.Load):
            rewrite.replace_node(node, literal_text(constant.value))


def _skip_identities(rewrite: Rewrite) -> None:
    """`self.norm(x)` is x where the norm can only be nn.Identity()."""
    for node in rewrite.source.of_kind(ast.Call):
        if rewrite.facts.values.get(node.func) == IDENTITY:
            rewrite.keep_only(node, node.args[0])


def _drop_attributes(rewrite: Rewrite) -> None:
    """`self.x = constant` that nobody reads."""
    for cls in rewrite.program.classes.values():
        for node in _assignments(rewrite, cls.node):
            target = _single_target(node)
            if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
                continue
            owners = rewrite.program.relatives(cls.name)
            if any((owner, target.attr) in rewrite.facts.read_attributes for owner in owners):
                continue
            value = rewrite.facts.attributes.get((cls.name, target.attr))
            known = value is not None and (value.constants is not None or value == IDENTITY)
            if target.value.id == "self" and known and node.value is not None and rewrite.is_pure(node.value):
                rewrite.delete(node)
                rewrite.dropped[cls.name].setdefault(target.attr, value or NOTHING)


def _assignments(rewrite: Rewrite, top: ast.stmt | None = None) -> list[ast.Assign | ast.AnnAssign]:
    return [*rewrite.source.of_kind(ast.Assign, top), *rewrite.source.of_kind(ast.AnnAssign, top)]


def _single_target(node: ast.AST) -> ast.expr | None:
    if isinstance(node, ast.Assign):
        return node.targets[0] if len(node.targets) == 1 else None
    return node.target if isinstance(node, ast.AnnAssign) else None


def _drop_declarations(rewrite: Rewrite) -> None:
    """`x: Tensor` in a class whose attribute nobody uses any more."""
    used = {n.attr for n in rewrite.source.of_kind(ast.Attribute)}
    used |= {str(n.value) for n in rewrite.source.of_kind(ast.Constant)}
    for cls in rewrite.program.classes.values():
        for node in cls.node.body if cls.bases else ():
            if isinstance(node, ast.AnnAssign) and node.value is None and ast.unparse(node.target) not in used:
                rewrite.delete(node)


def _drop_locals(rewrite: Rewrite) -> None:
    """Local names that are set and never read, or set to themselves."""
    for node in _assignments(rewrite):
        scope, target = rewrite.function_around(node), _single_target(node)
        if scope is None or node.value is None:
            continue
        if isinstance(target, ast.Name) and _is_needless(rewrite, target, node.value, scope):
            rewrite.delete(node)
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            _drop_unpacked(rewrite, node, target, node.value, scope)


def _drop_unpacked(rewrite: Rewrite, node: ast.stmt, target: ast.Tuple, value: ast.Tuple, scope: Function) -> None:
    """`a, b = x, y` without the parts that nobody reads."""
    if len(target.elts) != len(value.elts) or not all(isinstance(t, ast.Name) for t in target.elts):
        return
    dropped = [_is_needless(rewrite, t, v, scope) for t, v in zip(target.elts, value.elts, strict=True)]
    if all(dropped):
        rewrite.delete(node)
    elif any(dropped):
        drop_elements(rewrite, target, dropped)
        drop_elements(rewrite, value, dropped)


def _is_needless(rewrite: Rewrite, target: ast.expr, value: ast.expr, scope: Function) -> bool:
    """Setting a name that nobody reads, or to itself."""
    if not isinstance(target, ast.Name):
        return False
    if isinstance(value, ast.Name) and value.id == target.id:
        return True
    return target.id not in read_names(scope) and rewrite.is_pure(value)


def _drop_empty_hooks(rewrite: Rewrite) -> None:
    """A hook or constructor with nothing left to do, and calls of it on self; others ask whether there is one."""
    empty = {m for name in HOOKS for m in rewrite.program.methods_named(name) if _does_nothing(m)}
    empty |= {m for m in rewrite.program.methods_named("__init__") if _does_nothing(m) and not m.parameters}
    for call in rewrite.facts.calls.values():
        statement = rewrite.source.parents[call.node]
        on_self = isinstance(call.node.func, ast.Attribute) and ast.unparse(call.node.func.value) == "self"
        if on_self and isinstance(statement, ast.Expr) and call.arguments.keys() <= empty:
            rewrite.delete(statement)
    for method in empty:
        rewrite.delete(method.node)
        rewrite.dropped[method.cls or ""].setdefault(method.node.name, NOTHING)


def _does_nothing(procedure: Procedure) -> bool:
    return all(
        isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        for s in procedure.node.body
    )


def _drop_code(rewrite: Rewrite, entries: frozenset[str]) -> None:
    """Functions, classes, methods and constants that nothing reaches any more."""
    for method in (m for c in rewrite.program.classes.values() for m in c.methods.values()):
        if method not in rewrite.facts.reached:
            rewrite.delete(method.node)
            rewrite.dropped[method.cls or ""].setdefault(method.node.name, NOTHING)
    for procedure in rewrite.program.procedures():
        if procedure.outer is not None and procedure not in rewrite.facts.reached:
            rewrite.delete(procedure.node)
    top = {name: node for node in rewrite.source.tree.body for name in _defined(node)}
    precise = rewrite.is_empty  # else in the next round: telling locals from globals takes time
    needed: set[str] = set()
    todo = [n for n in rewrite.source.tree.body if not list(_defined(n)) and not _is_import(n)]
    todo += [top[e] for e in entries if e in top]
    while todo:
        node = todo.pop()
        for name in (global_names(node) if precise else all_names(node)) & top.keys() - needed:
            needed.add(name)
            todo.append(top[name])
    for node in rewrite.source.tree.body:
        names = list(_defined(node))
        if names and not any(n in needed or n in entries for n in names):
            rewrite.delete(node)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    target = _single_target(node)
    if isinstance(target, ast.Name):
        yield target.id


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)
