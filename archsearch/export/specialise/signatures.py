"""Rules that change what functions take and give: unread parameters and results that every caller throws away."""

from __future__ import annotations

import ast

from archsearch.export.specialise.facts import Parameter
from archsearch.export.specialise.program import Procedure
from archsearch.export.specialise.rewrite import Rewrite
from archsearch.export.specialise.values import NOTHING


def fold_signatures(rewrite: Rewrite) -> None:
    """All rules of this file."""
    _drop_parameters(rewrite)
    _drop_results(rewrite)


def _drop_parameters(rewrite: Rewrite) -> None:
    """Parameters that nobody reads, and the arguments that filled them."""
    facts = rewrite.facts
    unread: set[Parameter] = {
        (procedure, p.arg)
        for procedure in rewrite.program.procedures()
        for p in procedure.parameters
        if not procedure.node.args.posonlyargs
    }
    unread -= facts.read_parameters | facts.fixed | facts.starred
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
        given: list[ast.expr | ast.keyword] = [*call.node.args, *call.node.keywords]
        values = [g.value if isinstance(g, ast.keyword) else g for g in given]
        dropped = [v in filled and filled[v] <= unread for v in values]
        if any(dropped):
            rewrite.touch(call.node)
            rewrite.drop_items([_argument_span(rewrite, g) for g in given], dropped)
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


def _drop_results(rewrite: Rewrite) -> None:
    """Elements of a returned tuple that every caller throws away."""
    returns: dict[Procedure, list[ast.Return]] = {}
    for node, procedure in rewrite.facts.results.items():
        returns.setdefault(procedure, []).append(node)
    fixed = {procedure for procedure, _ in rewrite.facts.fixed | rewrite.facts.starred}
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
            drop_elements(rewrite, node.value, dropped)
        annotation = procedure.node.returns
        if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
            if dropped.count(False) == 1:
                rewrite.keep_only(annotation, annotation.slice.elts[dropped.index(False)])
            else:
                rewrite.drop_items([rewrite.source.span(e) for e in annotation.slice.elts], dropped)
    for call in rewrite.facts.calls.values():
        target = _unpacking(rewrite, call.node)
        for procedure in call.arguments:
            if procedure in dropping and target is not None:
                drop_elements(rewrite, target, dropping[procedure])
                break


def _unpacking(rewrite: Rewrite, call: ast.Call) -> ast.Tuple | None:
    """The tuple of names that a call's result is unpacked into."""
    statement = rewrite.source.parents[call]
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and statement.value is call:
        target = statement.targets[0]
        return target if isinstance(target, ast.Tuple) else None
    return None


def _is_thrown_away(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id == "_"


def drop_elements(rewrite: Rewrite, node: ast.Tuple, dropped: list[bool]) -> None:
    """Leave elements out of a tuple; one that remains alone is no tuple any more."""
    rewrite.touch(node)
    if dropped.count(False) == 1:
        rewrite.keep_only(node, node.elts[dropped.index(False)])
    else:
        rewrite.drop_items([rewrite.source.wrapped_span(e) for e in node.elts], dropped)
