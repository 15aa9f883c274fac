"""Specialise a module to the one model in it: an option that is the same everywhere is no option.

A partial evaluator (Jones, Gomard & Sestoft 1993) on source text: find out what can reach where, fold tests that have
one outcome, remove what is then unused, and begin again until nothing changes.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable

from archsearch.export.source import Source
from archsearch.export.specialise.analysis import Analysis
from archsearch.export.specialise.branches import fold_branches
from archsearch.export.specialise.docs import trim_docstrings
from archsearch.export.specialise.inline import simplify
from archsearch.export.specialise.merge import merge_ends
from archsearch.export.specialise.program import Program
from archsearch.export.specialise.rewrite import Rewrite
from archsearch.export.specialise.signatures import fold_signatures
from archsearch.export.specialise.unused import drop_unused
from archsearch.export.specialise.values import Value

MAX_ROUNDS = 100


def specialised(text: str, entries: frozenset[str], cut: Callable[[str], str]) -> str:
    """The text of a module as the one model in it needs it, its formatting aside (`tidy`).

    entries: functions and classes that others use. cut: takes out what no analysis tells, here before the rounds and
    again if options that asked for it have gone.
    """
    specialiser = Specialiser(cut(text), entries)
    done = specialiser.run()
    rest = cut(done.text)
    if rest != done.text:
        specialiser.source = Source(rest)
        done = specialiser.run()
    return merge_ends(trim_docstrings(done, specialiser.dropped, specialiser.required)).text


class Specialiser:
    """Runs the rounds.

    `dropped`: parameters and attributes that went, and what they always were; `required`: parameters that lost a
    default nobody used; both by function or class.
    """

    def __init__(self, text: str, entries: frozenset[str]) -> None:
        self.source = Source(text)
        self.entries = entries
        self.dropped: dict[str, dict[str, Value]] = defaultdict(dict)
        self.required: dict[str, set[str]] = defaultdict(set)
        self._touched: set[str] = set()

    def run(self) -> Source:
        """The specialised source."""
        was_on = gc.isenabled()
        gc.disable()  # syntax trees are many small objects, none of them garbage
        try:
            for _ in range(MAX_ROUNDS):
                if not self._round():
                    return self.source
        finally:
            if was_on:
                gc.enable()
        raise AssertionError(f"specialising did not end within {MAX_ROUNDS} rounds")

    def _round(self) -> bool:
        """One analysis and all that follows from it; whether anything changed."""
        program = Program(self.source)
        rewrite = Rewrite(self.source, program, Analysis(program, self.entries).facts())
        fold_branches(rewrite)
        drop_unused(rewrite, self.entries)
        fold_signatures(rewrite)
        if rewrite.is_empty:
            simplify(rewrite, self._touched)
        if rewrite.is_empty:
            return False
        self.source = rewrite.result()
        self._touched |= rewrite.touched
        for owner, gone in rewrite.dropped.items():
            self.dropped[owner] = {**gone, **self.dropped[owner]}
        for owner, names in rewrite.required.items():
            self.required[owner] |= names
        return True
