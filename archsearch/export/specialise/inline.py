"""Rules for code that folding has left smaller than a person would write: trivial wrappers, names used once."""

from __future__ import annotations

import ast
import re

from archsearch.export.source import Edit, apply, bound_names, global_reads
from archsearch.export.specialise.facts import Call
from archsearch.export.specialise.program import Procedure
from archsearch.export.specialise.rewrite import ATOMIC, Rewrite

LONGEST = 90  # characters of an expression that may take the place of a call


def simplify(rewrite: Rewrite, touched: set[str]) -> None:
    """All rules of this file; `touched` names the functions that folding has changed."""
    _inline_copies(rewrite, touched)
    _return_directly(rewrite)
    _leave_defaults(rewrite)
    _untype_any(rewrite)
    _tighten_signatures(rewrite)
    if rewrite.is_empty:  # it repeats text that the others would change
        _inline_wrappers(rewrite, touched)


def _inline_wrappers(rewrite: Rewrite, touched: set[str]) -> None:
    calls: dict[Procedure, list[Call]] = {}
    for call in rewrite.facts.calls.values():
        for procedure in call.arguments:
            calls.setdefault(procedure, []).append(call)
    for procedure, sites in calls.items():
        changed = procedure.name in touched and procedure.outer is None and not procedure.decorators
        value = _single_return(procedure) if changed else None
        if value is None:
            continue
        new = [_inlined(rewrite, procedure, value, call) for call in sites]
        if all(text is not None for text in new):
            for call, text in zip(sites, new, strict=True):
                if text is not None:
                    rewrite.touch(call.node)
                    rewrite.replace(*rewrite.source.span(call.node), text)


def _single_return(procedure: Procedure) -> ast.expr | None:
    """The value of a function that does nothing but return it."""
    body = [s for s in procedure.node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        return None
    scoped = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.NamedExpr, ast.JoinedStr)
    return None if any(isinstance(n, scoped) for n in ast.walk(body[0].value)) else body[0].value


def _inlined(rewrite: Rewrite, procedure: Procedure, value: ast.expr, call: Call) -> str | None:
    """What to write instead of a call, or None if that would not be shorter or not be the same."""
    source = rewrite.source
    arguments = call.arguments[procedure]
    own_name = procedure.node.name if procedure.cls is None else f"self.{procedure.node.name}"
    same_text = ast.unparse(call.node.func) == own_name
    caller = rewrite.function_around(call.node)
    if len(call.arguments) > 1 or not same_text or caller is procedure.node or caller is None:
        return None
    parameters = {p.arg for p in procedure.parameters}
    if arguments.keys() != parameters or any(isinstance(a, ast.Starred) for a in arguments.values()):
        return None
    start = source.span(value)[0]
    edits = []
    reads = [n for n in ast.walk(value) if isinstance(n, ast.Name) and n.id in parameters]
    for name, argument in arguments.items():
        mine = [n for n in reads if n.id == name]
        is_simple = isinstance(argument, ast.Name | ast.Constant)
        if len(mine) > 1 and not is_simple:
            return None
        for node in mine:
            if not isinstance(argument, (*ATOMIC, ast.BinOp, ast.UnaryOp, ast.Compare)):
                return None
            loose = isinstance(argument, ATOMIC) or isinstance(source.parents[node], ast.Call | ast.Return)
            text = source.segment(argument)
            a, b = source.span(node)
            edits.append(Edit(a - start, b - start, text if loose else f"({text})"))
    names = {n.id for n in global_reads(value)} - parameters - {"self"}
    text = re.sub(r"\s*\n\s*", " ", apply(source.segment(value), edits))
    if names & bound_names(caller) or len(text) > LONGEST or "#" in text:
        return None
    parent = source.parents[call.node]
    loose = isinstance(value, ATOMIC) or isinstance(parent, ast.stmt | ast.Call | ast.keyword | ast.Tuple)
    return text if loose else f"({text})"


def _inline_copies(rewrite: Rewrite, touched: set[str]) -> None:
    """`h = x` is needless where x stays what it is for as long as h is read."""
    for procedure in rewrite.program.procedures():
        if procedure.name not in touched or procedure.inner:
            continue
        body = procedure.node.body
        names = [
            (i, n) for i, s in enumerate(body) for n in rewrite.source.nodes(s) if isinstance(n, ast.Name)
        ]  # with the number of the statement they stand in
        for at, node in enumerate(body):
            if not isinstance(node, ast.Assign) or len(node.targets) > 1 or not isinstance(node.value, ast.Name):
                continue
            target, original = node.targets[0], node.value.id
            if not isinstance(target, ast.Name):
                continue
            reads = [(i, n) for i, n in names if n.id == target.id and isinstance(n.ctx, ast.Load)]
            stores = [n for _, n in names if n.id == target.id and isinstance(n.ctx, ast.Store)]
            changes = [i for i, n in names if n.id == original and isinstance(n.ctx, ast.Store) and i > at]
            last = max((i for i, _ in reads), default=at)
            change = min(changes, default=len(body))
            ends_first = last < change or (last == change and isinstance(body[change], ast.Assign))
            if len(stores) == 1 and all(i > at for i, _ in reads) and ends_first:
                for _, read in reads:
                    rewrite.replace_node(read, original)
                rewrite.delete(node)


def _return_directly(rewrite: Rewrite) -> None:
    """`y = f(x)` and `return y` become `return f(x)`."""
    source = rewrite.source
    for _, block in source.blocks:
        if len(block) < 2 or not isinstance(block[-1], ast.Return) or not isinstance(block[-1].value, ast.Name):
            continue
        setting = block[-2]
        if rewrite.is_gone(setting):
            continue
        if isinstance(setting, ast.Assign) and len(setting.targets) == 1:
            target: ast.expr = setting.targets[0]
        elif isinstance(setting, ast.AnnAssign) and setting.value is not None:
            target = setting.target
        else:
            continue
        if isinstance(target, ast.Name) and target.id == block[-1].value.id and setting.value is not None:
            rewrite.replace(source.span(setting)[0], source.wrapped_span(setting.value)[0], "return ")
            rewrite.delete(block[-1])


def _leave_defaults(rewrite: Rewrite) -> None:
    """`F.linear(x, w, None)` is `F.linear(x, w)`: what torch.nn.functional may be given last is None by default."""
    for node in rewrite.source.of_kind(ast.Call):
        last = node.args[-1] if node.args else None
        if isinstance(last, ast.Constant) and last.value is None and ast.unparse(node.func).startswith("F."):
            items = [*node.args, *node.keywords]
            rewrite.touch(node)
            rewrite.drop_items([rewrite.source.span(a) for a in items], [a is last for a in items])


def _untype_any(rewrite: Rewrite) -> None:
    """`self.mixer: Any = mixer` is for type checkers that look into nn.Module."""
    for node in rewrite.source.of_kind(ast.AnnAssign):
        if ast.unparse(node.annotation) == "Any" and node.value is not None:
            rewrite.replace(rewrite.source.span(node.target)[1], rewrite.source.span(node.annotation)[1])


def _tighten_signatures(rewrite: Rewrite) -> None:
    """`x: int | None = None` is `x: int` where an int is always passed."""
    facts, source = rewrite.facts, rewrite.source
    for procedure in facts.reached:
        can_drop = True
        keyword_only = {p.arg for p in procedure.node.args.kwonlyargs}
        for parameter in procedure.parameters:
            place = (procedure, parameter.arg)
            default = procedure.defaults.get(parameter.arg)
            is_free = place not in facts.fixed and place not in facts.defaulted
            if default is not None and is_free and (can_drop or parameter.arg in keyword_only):
                before = parameter.annotation or parameter
                rewrite.touch(procedure.node.body[0])
                rewrite.replace(source.span(before)[1], source.wrapped_span(default)[1])
                rewrite.required[procedure.name].add(parameter.arg)
            elif default is not None:
                can_drop = False
            annotation = parameter.annotation
            value = facts.parameters.get(place)
            optional = isinstance(annotation, ast.BinOp) and ast.unparse(annotation.right) == "None"
            if not optional or value is None or value.can_be_none():
                continue
            if parameter.arg not in _perhaps_none(procedure):
                assert isinstance(annotation, ast.BinOp)
                rewrite.keep_only(annotation, annotation.left)


def _perhaps_none(procedure: Procedure) -> set[str]:
    """Names that are bound in a function to anything but what a call or arithmetic gives."""
    nodes = list(ast.walk(procedure.node))
    computed = (ast.Call, ast.BinOp, ast.GeneratorExp)
    statements = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.value, computed)]
    safe = {n for s in statements for target in s.targets for n in ast.walk(target)}
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n not in safe}
