"""Rules that fold tests whose outcome is known: dead branches go, what is left moves up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from archsearch.export.specialise.rewrite import ATOMIC, Rewrite

ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
NEGATED = {ast.Is: "is not", ast.IsNot: "is", ast.Eq: "!=", ast.NotEq: "=="}


def fold_branches(rewrite: Rewrite) -> None:
    """All rules of this file."""
    source = rewrite.source
    for branch in source.of_kind(ast.If):
        if not _is_elif(rewrite, branch):
            _fold_if(rewrite, branch)
    for choice in source.of_kind(ast.IfExp):
        if (known := _known(rewrite, choice.test)) is not None:
            rewrite.keep_only(choice, choice.body if known else choice.orelse)
    for operation in source.of_kind(ast.BoolOp):
        _fold_and_or(rewrite, operation)
    for product in source.of_kind(ast.BinOp):
        if isinstance(product.op, ast.Mult):
            _fold_factor(rewrite, product)
    for table, entry in rewrite.facts.chosen.items():
        rewrite.keep_only(table, entry)
    for test in source.of_kind(ast.Assert):
        if _known(rewrite, test.test):
            rewrite.delete(test)
    for repeat in source.of_kind(ast.While):
        if _known(rewrite, repeat.test) is False:
            rewrite.delete(repeat)
    for loop in source.of_kind(ast.For):
        if _is_empty(loop.body) and not loop.orelse and rewrite.is_pure(loop.iter):
            rewrite.delete(loop)
    for _, block in source.blocks:
        ends = [i for i, s in enumerate(block) if isinstance(s, ENDS)]
        for statement in block[ends[0] + 1 :] if ends else []:
            rewrite.delete(statement)
        if len(block) > 1:
            for statement in block:
                if isinstance(statement, ast.Pass):
                    rewrite.delete(statement)


def _known(rewrite: Rewrite, test: ast.expr) -> bool | None:
    truths = rewrite.facts.truths.get(test, frozenset())
    return next(iter(truths)) if len(truths) == 1 and rewrite.is_pure(test) else None


def _is_empty(body: list[ast.stmt]) -> bool:
    return all(isinstance(s, ast.Pass) for s in body)


def _is_elif(rewrite: Rewrite, node: ast.If) -> bool:
    return rewrite.source.text.startswith("elif", rewrite.source.span(node)[0])


@dataclass(frozen=True)
class Clause:
    """One arm of an if: its header lines, its block, and what is known of its test (an else is always true)."""

    node: ast.If | None
    header: tuple[int, int]
    body: list[ast.stmt]
    known: bool | None


def _clauses(rewrite: Rewrite, node: ast.If) -> Iterator[Clause]:
    source = rewrite.source
    asked: set[str] = set()
    while True:
        first = source.body_lines(node.body)[0]
        test = source.segment(node.test)
        known = False if test in asked and rewrite.is_pure(node.test) else _known(rewrite, node.test)
        asked.add(test)
        yield Clause(node, (node.lineno, first - 1), node.body, known)
        if not node.orelse:
            return
        last = source.body_lines(node.body)[1]
        following = node.orelse[0]
        if isinstance(following, ast.If) and _is_elif(rewrite, following):
            node = following
            continue
        header = next(n for n in range(last + 1, following.lineno) if re.match(r"\s*else\s*:", source.lines[n - 1]))
        yield Clause(None, (header, source.body_lines(node.orelse)[0] - 1), node.orelse, True)
        return


def _fold_if(rewrite: Rewrite, node: ast.If) -> None:
    source = rewrite.source
    clauses = list(_clauses(rewrite, node))
    live = [c for c in clauses if c.known is not False]
    always = next((i for i, c in enumerate(live) if c.known), None)
    if always is not None:
        live = live[: always + 1]
    if live and live[-1].node is None and _is_empty(live[-1].body) and len(live) > 1:
        live.pop()
    if not live or (len(live) == 1 and _is_empty(live[0].body) and (live[0].known or _test_is_pure(rewrite, live[0]))):
        rewrite.delete(node)
        return
    if len(live) == 2 and _is_empty(live[0].body) and live[1].node is None and len(clauses) == 2:
        _negate(rewrite, node, live)
        return
    if live == clauses and (always is None or live[always].node is None):
        return
    rewrite.touch(node)
    for clause in clauses:
        if clause not in live:
            rewrite.delete_lines(clause.header[0], source.body_lines(clause.body)[1])
    only = live[0]
    if only.known:
        rewrite.delete_lines(*only.header)
        rewrite.dedent(*source.body_lines(only.body), only.body[0].col_offset - node.col_offset)
        return
    start = source.span(only.node)[0] if only.node is not None else 0
    if only.node is not node:
        rewrite.replace(start, start + len("el"))
    last = live[-1]
    if last.known and last.node is not None:
        rewrite.replace(source.span(last.node)[0], source.line_span(*last.header)[1], "else:\n")


def _test_is_pure(rewrite: Rewrite, clause: Clause) -> bool:
    return clause.node is None or rewrite.is_pure(clause.node.test)


def _negate(rewrite: Rewrite, node: ast.If, clauses: list[Clause]) -> None:
    """`if a: pass` with an else becomes `if not a`."""
    source = rewrite.source
    rewrite.touch(node)
    start, end = source.wrapped_span(node.test)
    match node.test:
        case ast.Compare(ops=[op], comparators=[right]) if type(op) in NEGATED:
            between = (source.wrapped_span(node.test.left)[1], source.wrapped_span(right)[0])
            rewrite.replace(*between, f" {NEGATED[type(op)]} ")
        case ast.UnaryOp(op=ast.Not()):
            rewrite.replace(source.span(node)[0], source.wrapped_span(node.test.operand)[0], "if ")
        case _:
            loose = isinstance(node.test, ATOMIC) or source.text[start] == "("
            rewrite.replace(source.span(node)[0], start, "if not " if loose else "if not (")
            if not loose:
                rewrite.replace(end, source.text.index(":", end), ")")
    rewrite.delete_lines(clauses[0].header[1] + 1, clauses[1].header[1])


def _fold_and_or(rewrite: Rewrite, node: ast.BoolOp) -> None:
    """Operands that never decide go; all that remain keep their order."""
    neutral = isinstance(node.op, ast.And)
    as_test = _is_test(rewrite, node)
    if not any(operand in rewrite.facts.truths for operand in node.values):
        return  # the whole of it is never reached
    kept = []
    for operand in node.values:
        truths = rewrite.facts.truths.get(operand)
        if truths is None:
            continue  # never reached: an operand before it decides
        is_last = operand is node.values[-1]
        if truths != {neutral} or not rewrite.is_pure(operand) or (is_last and not as_test):
            kept.append(operand)
    if len(kept) == len(node.values) or not kept:
        return
    if len(kept) == 1:
        rewrite.keep_only(node, kept[0])
        return
    source = rewrite.source
    rewrite.touch(node)
    spans = [source.wrapped_span(v) for v in node.values]
    rewrite.drop_items(spans, [v not in kept for v in node.values])


def _fold_factor(rewrite: Rewrite, node: ast.BinOp) -> None:
    """A scale that is always 1.0; a count that happens to be 1 stays, the code is about counts."""
    for factor, other in ((node.left, node.right), (node.right, node.left)):
        value = rewrite.facts.values.get(factor)
        constant = None if value is None else value.constant
        if constant is not None and constant.type == "float" and constant.value == 1.0:
            return rewrite.keep_only(node, other)
    return None


def _is_test(rewrite: Rewrite, node: ast.expr) -> bool:
    """Whether only the truth of the expression counts."""
    parent = rewrite.source.parents[node]
    if isinstance(parent, ast.If | ast.While | ast.IfExp):
        return node is parent.test
    return isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)
