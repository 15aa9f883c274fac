"""Every error that archsearch raises on purpose, so that callers can catch one family at a time.

ArchsearchError
├── UserError(ValueError)      what a person typed or pointed at; the CLI prints it and exits with 2
│   ├── SpaceError             space.yaml is wrong: says file, line, path, found, expected
│   ├── GraphError             an architecture that cannot be a model (shapes, causality, sharing)
│   ├── DataError              a corpus, a tokenizer or a packed file that cannot be used
│   ├── RunError               a run folder that cannot be used (locked, changed, missing)
│   └── ExportError            an export that cannot be written
└── TrialError                 a trial that ended without a result; `reason` goes into its record
    ├── NonFiniteError         loss or gradient became NaN or infinite, at `step`
    └── OutOfMemoryError       the device (or the memory limit) had no room
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArchsearchError(Exception):
    """Root of the tree above."""


class UserError(ArchsearchError, ValueError):
    """Something a person can mend; the message says where, what was found and what to write instead."""


class SpaceError(UserError):
    """space.yaml is wrong. `problems` holds one line per mistake, all of them at once."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class GraphError(UserError):
    """The layer graph is refused before any tensor exists."""


class DataError(UserError):
    """A corpus, tokenizer or packed file cannot be used."""


class RunError(UserError):
    """A run folder cannot be used."""


class ExportError(UserError):
    """An export cannot be written; nothing was left behind."""


class TrialError(ArchsearchError):
    """A trial ended without a result; `reason` is the word that goes into its record."""

    reason = "error"


class NonFiniteError(TrialError):
    """Loss or gradient norm became NaN or infinite."""

    reason = "non_finite"

    def __init__(self, what: str, step: int) -> None:
        self.step = step
        super().__init__(f"{what} became non-finite at step {step}")


class OutOfMemoryError(TrialError):
    """The device had no room for the model, its activations or its state."""

    reason = "out_of_memory"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest of `known`, or an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_of(known: Iterable[str]) -> str:
    """`one of a, b, c`, as error messages list what was expected."""
    names = sorted(known)
    return names[0] if len(names) == 1 else "one of " + ", ".join(names)
