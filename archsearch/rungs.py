"""Successive halving for several objectives: which stopped trials go on to the next rung.

Asynchronous promotion as in ASHA (1810.05934), ranked by non-domination and then crowding as in MO-ASHA
(2106.12639): at each rung the best `keep` share of all that reached it goes on, as soon as enough have arrived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from archsearch.pareto import crowding, ranks


@dataclass
class Rungs:
    """What every trial showed at every rung it reached; values are to be minimised.

    n_rungs: how many there are; the last is the full budget. keep: share that goes on from each of the others.
    """

    n_rungs: int
    keep: float
    results: dict[int, dict[int, tuple[float, ...]]] = field(default_factory=dict)  # rung -> trial -> values
    promoted: dict[int, set[int]] = field(default_factory=dict)  # rung -> trials that went on

    @property
    def last(self) -> int:
        """The rung at which a trial is complete."""
        return self.n_rungs - 1

    def report(self, trial: int, rung: int, values: Sequence[float]) -> None:
        """A trial reached the end of a rung."""
        self.results.setdefault(rung, {})[trial] = tuple(values)

    def promote(self, trial: int, rung: int) -> None:
        """Note that a trial goes on from a rung."""
        self.promoted.setdefault(rung, set()).add(trial)

    def next(self) -> tuple[int, int] | None:
        """(trial, rung it leaves) for the best trial that may go on, highest rung first; None if there is none."""
        for rung in range(self.last - 1, -1, -1):
            arrived = self.results.get(rung, {})
            gone = self.promoted.get(rung, set())
            if math.floor(self.keep * len(arrived)) <= len(gone):
                continue
            for trial in best_first(arrived)[: math.floor(self.keep * len(arrived))]:
                if trial not in gone:
                    return trial, rung
        return None

    def stopped(self) -> dict[int, int]:
        """Trials that wait below the last rung, with the rung they reached."""
        waiting: dict[int, int] = {}
        for rung, arrived in self.results.items():
            if rung < self.last:
                for trial in arrived.keys() - self.promoted.get(rung, set()):
                    waiting[trial] = rung
        return waiting


def best_first(values: Mapping[int, Sequence[float]]) -> list[int]:
    """Trials by non-dominated rank, then by crowding distance (lonely ones first), then by number."""
    trials = sorted(values)
    matrix = np.array([values[trial] for trial in trials], dtype=float)
    rank = ranks(matrix)
    distance = np.zeros(len(trials))
    for level in set(rank.tolist()):
        at = np.flatnonzero(rank == level)
        distance[at] = crowding(matrix[at])
    order = sorted(range(len(trials)), key=lambda i: (rank[i], -distance[i], trials[i]))
    return [trials[i] for i in order]
