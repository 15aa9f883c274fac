"""A function whose only user ends by returning what it returns becomes the end of that user."""

from __future__ import annotations

import ast
import textwrap
from collections import Counter

from archsearch.export.source import SCOPES, Edit, Source, bound_names, global_reads, walk

NUMBERS = ("bool", "int", "float")


def merge_ends(source: Source) -> Source:
    """The source with every `return helper(a, b)` replaced by the body of `helper(a, b)`, if nobody else uses it."""
    users: set[str] = set()
    while pairs := _pairs(source):
        functions = _functions(source)
        source = source.edited(
            edit for user, helper in pairs.items() for edit in _edits(source, functions[user], functions[helper])
        )
        users |= pairs.keys()
    return _without_other_types(source, users) if users else source


def _functions(source: Source) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in source.tree.body if isinstance(node, ast.FunctionDef)}


def _pairs(source: Source) -> dict[str, str]:
    """Functions and the helpers that can become their ends; none is in two pairs."""
    functions = _functions(source)
    ends = {name: found for name, node in functions.items() if (found := _last_called(node)) in functions}
    if not ends:
        return {}
    uses = Counter(node.id for node in source.of_kind(ast.Name))
    pairs: dict[str, str] = {}
    for user, helper in ends.items():
        free = not {user, helper} & {*pairs.keys(), *pairs.values()}
        if free and uses[helper] == 1 and _fits(functions[user], functions[helper]):
            pairs[user] = helper
    return pairs


def _last_called(user: ast.FunctionDef) -> str:
    """The function whose result a function ends by returning; empty if it ends in another way."""
    last = user.body[-1]
    call = last.value if isinstance(last, ast.Return) else None
    return call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""


def _fits(user: ast.FunctionDef, helper: ast.FunctionDef) -> bool:
    """Whether the helper's body means in the user what it means at home."""
    call = user.body[-1].value  # type: ignore[attr-defined]
    a = helper.args
    if helper is user or helper.decorator_list or user.decorator_list or a.vararg or a.kwarg or a.posonlyargs:
        return False
    if any(isinstance(node, SCOPES) for s in (*user.body, *helper.body) for node in walk(s)):
        return False
    given: dict[str | None, ast.expr] = dict(zip((p.arg for p in a.args), call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords}
    same = all(isinstance(value, ast.Name) and value.id == name for name, value in given.items())
    complete = given.keys() == {p.arg for p in [*a.args, *a.kwonlyargs]}
    hidden = bound_names(user) & {
        read.id for s in helper.body for read in global_reads(s, frozenset(bound_names(helper)))
    }
    return same and complete and not hidden


def _edits(source: Source, user: ast.FunctionDef, helper: ast.FunctionDef) -> list[Edit]:
    docstring = ast.get_docstring(helper) is not None
    skipped = 1 if docstring and (ast.get_docstring(user) is not None or len(user.body) > 1) else 0
    body = source.line_text(*source.body_lines(helper.body[skipped:]))
    edits = [Edit(*source.line_span(*source.statement_lines(user.body[-1])), body)]
    start, end = source.line_span(*source.statement_lines(helper))
    edits.append(Edit(start, end + _blank_lines_at(source.text, end), ""))
    if isinstance(user.returns, ast.BinOp) and helper.returns is not None:  # one of several is left
        edits.append(Edit(*source.span(user.returns), source.segment(helper.returns)))
    return edits


def _without_other_types(source: Source, users: set[str]) -> Source:
    """The functions without what their helpers did if a parameter, which is a number here, were a tensor."""
    edits = []
    for name, function in _functions(source).items():
        parameters = function.args.args if name in users else []
        numbers = {a.arg for a in parameters if isinstance(a.annotation, ast.Name) and a.annotation.id in NUMBERS}
        tests = {f"isinstance({number}, Tensor)" for number in numbers}
        for node in function.body:
            if isinstance(node, ast.If) and node.orelse and ast.unparse(node.test) in tests:
                kept = textwrap.indent(textwrap.dedent(source.line_text(*source.body_lines(node.orelse))), "    ")
                edits.append(Edit(*source.line_span(*source.statement_lines(node)), kept))
    return source.edited(edits)


def _blank_lines_at(text: str, start: int) -> int:
    return len(text[start:]) - len(text[start:].lstrip("\n"))
