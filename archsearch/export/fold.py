"""Specialise a module to the one model in it: an option that is the same everywhere is no option.

A partial evaluator (Jones, Gomard & Sestoft 1993) on source text: find out what can reach where, fold tests that have
one outcome, remove what is then unused, and begin again until nothing changes.
"""

from __future__ import annotations

import gc
from collections import defaultdict

from archsearch.export.analysis import Analysis
from archsearch.export.flow import fold_flow
from archsearch.export.inline import simplify
from archsearch.export.names import fold_names
from archsearch.export.program import Program
from archsearch.export.rewrite import Rewrite
from archsearch.export.signatures import fold_signatures
from archsearch.export.source import Source
from archsearch.export.values import Value

MAX_ROUNDS = 100


class Folder:
    """Runs the rounds.

    `dropped`: parameters and attributes that went, and what they always were; `required`: parameters that lost a
    default nobody used; both by function or class.
    """

    def __init__(self, text: str, entries: frozenset[str]) -> None:
        self.text = text
        self.entries = entries
        self.dropped: dict[str, dict[str, Value]] = defaultdict(dict)
        self.required: dict[str, set[str]] = defaultdict(set)
        self._touched: set[str] = set()

    def run(self) -> str:
        """The specialised text."""
        was_on = gc.isenabled()
        gc.disable()  # syntax trees are many small objects, none of them garbage
        try:
            for _ in range(MAX_ROUNDS):
                if not self._round():
                    return self.text
        finally:
            if was_on:
                gc.enable()
        raise AssertionError(f"folding did not end within {MAX_ROUNDS} rounds")

    def _round(self) -> bool:
        """One analysis and all that follows from it; whether anything changed."""
        source = Source(self.text)
        program = Program(source)
        rewrite = Rewrite(source, program, Analysis(program, self.entries).facts())
        fold_flow(rewrite)
        fold_names(rewrite, self.entries)
        fold_signatures(rewrite)
        if rewrite.is_empty:
            simplify(rewrite, self._touched)
        if rewrite.is_empty:
            return False
        self.text = rewrite.result()
        self._touched |= rewrite.touched
        for owner, gone in rewrite.dropped.items():
            self.dropped[owner] = {**gone, **self.dropped[owner]}
        for owner, names in rewrite.required.items():
            self.required[owner] |= names
        return True
