"""Edited sources are those of the edited text."""

from __future__ import annotations

import ast
import random

import pytest

from archsearch.export.source import Edit, Source, apply

TEXT = '''"""Docstring."""

# above
import os; import sys
x = 1; y = [
    2,
]


@decorated
def one(a):
    """Say é."""
    if a:  # why
        return {"ä": a}
    return None
    # below


class Two:
    b = 1

    def three(self): return self.b


z = """
text
"""  # end
'''


@pytest.mark.parametrize("seed", range(200))
def test_an_edited_source_is_that_of_the_edited_text(seed: int) -> None:
    rng, source = random.Random(seed), Source(TEXT)
    for _ in range(4):
        lines = len(source.lines)
        edits = []
        for _ in range(rng.randrange(3)):
            statement = rng.choice([s for _, block in source.blocks for s in block])
            start, end = source.line_span(*source.statement_lines(statement))
            new = " " * statement.col_offset + rng.choice(["pass\n", "u = 1\n", "u = [\n\n3]; v = 4\n"])
            edits.append(rng.choice([Edit(start, end, new), Edit(start, start, new)]))
        if rng.random() < 0.3:
            first, last = sorted(rng.sample(range(1, lines + 1), 2))
            edits = [Edit(*source.line_span(first, last), "w = 0\n")]
        edits = [e for i, e in enumerate(edits) if all(e.end <= o.start or e.start >= o.end for o in edits[:i])]
        expected = apply(source.text, edits)
        try:
            fresh = Source(expected)
        except SyntaxError:
            return
        source = source.edited(edits)
        assert source.text == expected
        assert ast.dump(source.tree, include_attributes=True) == ast.dump(fresh.tree, include_attributes=True)
        nodes = {n: i for i, n in enumerate(source.nodes(source.tree))}
        fresh_nodes = {n: i for i, n in enumerate(fresh.nodes(fresh.tree))}
        assert [nodes[source.parents[n]] for n in list(nodes)[1:]] == [
            fresh_nodes[fresh.parents[n]] for n in list(fresh_nodes)[1:]
        ]
