"""Rules that remove what nobody needs: constant options, unread parameters, attributes and locals, unused code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from archsearch.export.analysis import Parameter
from archsearch.export.program import Procedure
from archsearch.export.rewrite import Rewrite
from archsearch.export.source import global_reads
from archsearch.export.values import NOTHING, Instance, Value

HOOKS = ("reset_parameters", "update_bias")  # methods that a module may or may not have
IDENTITY = Value(frozenset({Instance("nn.Identity")}))


def fold_names(rewrite: Rewrite, entries: frozenset[str]) -> None:
    """All rules of this file."""
    _inline_constants(rewrite)
    _skip_identities(rewrite)
    _drop_parameters(rewrite)
    _drop_attributes(rewrite)
    _drop_locals(rewrite)
    _drop_results(rewrite)
    _drop_empty_hooks(rewrite)
    _drop_code(rewrite, entries)


def _inline_constants(rewrite: Rewrite) -> None:
    """None, True, False and strings are written out where they are read; numbers keep their names."""
    in_text = {
        n for f in rewrite.source.nodes(rewrite.source.tree) if isinstance(f, ast.JoinedStr) for n in ast.walk(f)
    }
    for node, value in rewrite.facts.values.items():
        constant = value.constant
        if constant is None or constant.type not in ("NoneType", "bool", "str") or node in in_text:
            continue
        if isinstance(getattr(node, "ctx", None), ast.Load):
            rewrite.replace_node(node, literal_text(constant.value))


def literal_text(value: object) -> str:
    """A literal as the formatter writes it: strings in double quotes."""
    text = repr(value)
    if isinstance(value, str) and '"' not in value and "'" not in value:
        return f'"{text[1:-1]}"'
    return text


def _skip_identities(rewrite: Rewrite) -> None:
    """`self.norm(x)` is x where the norm can only be nn.Identity()."""
    for node in rewrite.source.nodes(rewrite.source.tree):
        if isinstance(node, ast.Call) and rewrite.facts.values.get(node.func) == IDENTITY:
            rewrite.keep_only(node, node.args[0])


def _drop_parameters(rewrite: Rewrite) -> None:
    """Parameters that nobody reads, and the arguments that filled them."""
    facts = rewrite.facts
    unread: set[Parameter] = {
        (procedure, p.arg)
        for procedure in rewrite.program.procedures()
        for p in procedure.parameters
        if not procedure.node.args.posonlyargs
    }
    unread -= facts.read_parameters | facts.fixed
    # an argument goes only if every function that this call may reach can do without it
    filled: dict[ast.expr, set[Parameter]] = {}
    for call in facts.calls.values():
        for procedure, arguments in call.arguments.items():
            for name, argument in arguments.items():
                filled.setdefault(argument, set()).add((procedure, name))
    while True:
        stuck = {p for a, ps in filled.items() if not (ps <= unread and rewrite.is_pure(a)) for p in ps}
        if not unread & stuck:
            break
        unread -= stuck
    for call in facts.calls.values():
        arguments = [*call.node.args, *call.node.keywords]
        values = [a.value if isinstance(a, ast.keyword) else a for a in arguments]
        dropped = [a in filled and filled[a] <= unread for a in values]
        if any(dropped):
            rewrite.touch(call.node)
            rewrite.drop_items([_argument_span(rewrite, a) for a in arguments], dropped)
    for procedure in {procedure for procedure, _ in unread}:
        _drop_from_signature(rewrite, procedure, {name for p, name in unread if p is procedure})


def _argument_span(rewrite: Rewrite, node: ast.expr | ast.keyword) -> tuple[int, int]:
    if isinstance(node, ast.keyword):
        return rewrite.source.span(node)[0], rewrite.source.wrapped_span(node.value)[1]
    return rewrite.source.wrapped_span(node)


def _drop_from_signature(rewrite: Rewrite, procedure: Procedure, names: set[str]) -> None:
    source, a = rewrite.source, procedure.node.args
    rewrite.touch(procedure.node.body[0])
    owner = procedure.cls if procedure.node.name == "__init__" and procedure.cls else procedure.name
    values = {n: rewrite.facts.parameters.get((procedure, n), NOTHING) for n in names}
    rewrite.dropped[owner].update(values)
    positional, keyword_only = [*a.posonlyargs, *a.args], a.kwonlyargs
    items = [_parameter_span(rewrite, procedure, p) for p in positional]
    dropped = [p.arg in names for p in positional]
    if a.vararg is not None:
        start, end = source.span(a.vararg)
        items.append((start - 1, end))
        dropped.append(False)
    elif keyword_only:
        after = items[-1][1] if items else source.text.index("(", source.span(procedure.node)[0])
        star = source.text.index("*", after)
        items.append((star, star + 1))
        dropped.append(all(p.arg in names for p in keyword_only))
    items += [_parameter_span(rewrite, procedure, p) for p in keyword_only]
    dropped += [p.arg in names for p in keyword_only]
    if a.kwarg is not None:
        start, end = source.span(a.kwarg)
        items.append((start - 2, end))
        dropped.append(False)
    rewrite.drop_items(items, dropped)


def _parameter_span(rewrite: Rewrite, procedure: Procedure, parameter: ast.arg) -> tuple[int, int]:
    start, end = rewrite.source.span(parameter)
    default = procedure.defaults.get(parameter.arg)
    return start, end if default is None else rewrite.source.wrapped_span(default)[1]


def _drop_attributes(rewrite: Rewrite) -> None:
    """`self.x = constant` that nobody reads."""
    for cls in rewrite.program.classes.values():
        for node in rewrite.source.nodes(cls.node):
            target = _single_target(node)
            if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
                continue
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            owners = rewrite.program.relatives(cls.name)
            if any((owner, target.attr) in rewrite.facts.read_attributes for owner in owners):
                continue
            value = rewrite.facts.attributes.get((cls.name, target.attr))
            known = value is not None and (value.constants is not None or value == IDENTITY)
            if target.value.id == "self" and known and node.value is not None and rewrite.is_pure(node.value):
                rewrite.delete(node)
                rewrite.dropped[cls.name].setdefault(target.attr, value or NOTHING)


def _single_target(node: ast.AST) -> ast.expr | None:
    if isinstance(node, ast.Assign):
        return node.targets[0] if len(node.targets) == 1 else None
    return node.target if isinstance(node, ast.AnnAssign) else None


def _drop_locals(rewrite: Rewrite) -> None:
    """Local names that are set and never read, or set to themselves."""
    for scope in rewrite.source.nodes(rewrite.source.tree):
        if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        inside = rewrite.source.nodes(scope)
        read = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        read |= {n for s in inside if isinstance(s, ast.Global | ast.Nonlocal) for n in s.names}
        for node in inside:
            target = _single_target(node)
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            if isinstance(target, ast.Name) and _is_needless(rewrite, target, node.value, read):
                rewrite.delete(node)
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                _drop_unpacked(rewrite, node, target, node.value, read)


def _drop_unpacked(rewrite: Rewrite, node: ast.stmt, target: ast.Tuple, value: ast.Tuple, read: set[str]) -> None:
    """`a, b = x, y` without the parts that nobody reads."""
    if len(target.elts) != len(value.elts) or not all(isinstance(t, ast.Name) for t in target.elts):
        return
    dropped = [_is_needless(rewrite, t, v, read) for t, v in zip(target.elts, value.elts, strict=True)]
    if all(dropped):
        rewrite.delete(node)
    elif any(dropped):
        _drop_elements(rewrite, target, dropped)
        _drop_elements(rewrite, value, dropped)


def _is_needless(rewrite: Rewrite, target: ast.expr, value: ast.expr, read: set[str]) -> bool:
    """Setting a name that nobody reads, or to itself."""
    if not isinstance(target, ast.Name):
        return False
    if isinstance(value, ast.Name) and value.id == target.id:
        return True
    return target.id not in read and rewrite.is_pure(value)


def _drop_elements(rewrite: Rewrite, node: ast.Tuple, dropped: list[bool]) -> None:
    """Leave elements out of a tuple; one that remains alone is no tuple any more."""
    rewrite.touch(node)
    if dropped.count(False) == 1:
        rewrite.keep_only(node, node.elts[dropped.index(False)])
    else:
        rewrite.drop_items([rewrite.source.wrapped_span(e) for e in node.elts], dropped)


def _drop_results(rewrite: Rewrite) -> None:
    """Elements of a returned tuple that every caller throws away."""
    returns: dict[Procedure, list[ast.Return]] = {}
    for node, procedure in rewrite.facts.results.items():
        returns.setdefault(procedure, []).append(node)
    fixed = {procedure for procedure, _ in rewrite.facts.fixed}
    unused: dict[Procedure, list[bool]] = {}
    for procedure, nodes in returns.items():
        widths = {len(n.value.elts) if isinstance(n.value, ast.Tuple) else 0 for n in nodes}
        if len(widths) == 1 and 0 not in widths and procedure not in fixed:
            elements = zip(*(n.value.elts for n in nodes if isinstance(n.value, ast.Tuple)), strict=True)
            unused[procedure] = [all(rewrite.is_pure(e) for e in column) for column in elements]
    while True:
        before = {p: list(u) for p, u in unused.items()}
        for call in rewrite.facts.calls.values():
            target = _unpacking(rewrite, call.node)
            same = [unused.get(p) for p in call.arguments]
            width = len(target.elts) if target is not None else 0
            for procedure in call.arguments:
                if procedure in unused and any(u is None or len(u) != width for u in same):
                    del unused[procedure]
                elif procedure in unused and target is not None:
                    unused[procedure] = [
                        all(u[i] for u in same if u is not None) and _is_thrown_away(e)
                        for i, e in enumerate(target.elts)
                    ]
        if before == unused:
            break
    dropping = {p: u for p, u in unused.items() if any(u) and not all(u)}
    for procedure, dropped in dropping.items():
        for node in returns[procedure]:
            assert isinstance(node.value, ast.Tuple)
            _drop_elements(rewrite, node.value, dropped)
        annotation = procedure.node.returns
        if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
            if dropped.count(False) == 1:
                rewrite.keep_only(annotation, annotation.slice.elts[dropped.index(False)])
            else:
                rewrite.drop_items([rewrite.source.span(e) for e in annotation.slice.elts], dropped)
    for call in rewrite.facts.calls.values():
        dropped = next((dropping[p] for p in call.arguments if p in dropping), None)
        target = _unpacking(rewrite, call.node)
        if dropped is not None and target is not None:
            _drop_elements(rewrite, target, dropped)


def _unpacking(rewrite: Rewrite, call: ast.Call) -> ast.Tuple | None:
    """The tuple of names that a call's result is unpacked into."""
    statement = rewrite.source.parents[call]
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and statement.value is call:
        target = statement.targets[0]
        return target if isinstance(target, ast.Tuple) else None
    return None


def _is_thrown_away(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id == "_"


def _drop_empty_hooks(rewrite: Rewrite) -> None:
    """A hook with nothing left to do (its callers ask whether there is one), and calls of it on self."""
    empty = {m for name in HOOKS for m in rewrite.program.methods_named(name) if _does_nothing(m)}
    for call in rewrite.facts.calls.values():
        statement = rewrite.source.parents[call.node]
        on_self = isinstance(call.node.func, ast.Attribute) and ast.unparse(call.node.func.value) == "self"
        if on_self and isinstance(statement, ast.Expr) and call.arguments.keys() <= empty:
            rewrite.delete(statement)
    for method in empty:
        rewrite.delete(method.node)


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
        reads = global_reads(node) if precise else rewrite.source.nodes(node)
        for name in {n.id for n in reads if isinstance(n, ast.Name)} & top.keys() - needed:
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
