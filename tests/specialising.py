"""Texts of small programs, and what specialising leaves of them, for tests of `archsearch.export.specialise`."""

from __future__ import annotations

import textwrap

from archsearch.export.specialise.docs import trim_docstrings
from archsearch.export.specialise.specialiser import Specialiser
from archsearch.export.specialise.tidy import tidy

ENTRIES = frozenset({"main"})


def dedent(text: str) -> str:
    """A program as it stands indented in a test."""
    return textwrap.dedent(text).lstrip("\n")


def specialised(text: str) -> str:
    """The text, specialised to what `main` does, formatted."""
    before = dedent(text)
    specialiser = Specialiser(before, ENTRIES)
    folded = trim_docstrings(specialiser.run(), specialiser.dropped, specialiser.required)
    return tidy("import math\n" + folded.text, before).partition("\n\n\n")[2]
