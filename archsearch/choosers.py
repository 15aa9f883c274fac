"""Choosers that need no search library: random draws, values from a record, and every combination in turn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from archsearch.errors import SpaceError
from archsearch.space import Candidate, SearchSpace


class RandomChooser:
    """Uniform and independent; `log` ranges uniform in the logarithm. The same seed gives the same candidate."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.branching = 1.0  # product of the options seen: Knuth's estimate of the number of leaves

    def choice(self, name: str, options: Sequence[Any]) -> int:
        self.branching *= len(options)
        return self.random.randrange(len(options))

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        self.branching *= (high - low) // step + 1
        return self.random.randrange(low, high + 1, step)

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        if log:
            self.branching = math.inf
            return math.exp(self.random.uniform(math.log(low), math.log(high)))
        if step is None:
            self.branching = math.inf if high > low else self.branching
            return self.random.uniform(low, high)
        steps = int((high - low) / step + 1e-9)
        self.branching *= steps + 1
        return low + step * self.random.randint(0, steps)


def drawn(space: SearchSpace, seeds: Iterable[int]) -> Iterator[Candidate]:
    """The random candidate of every seed, without those whose options make no architecture together."""
    for seed in seeds:
        try:
            candidate = space.sample(RandomChooser(seed))
        except SpaceError:
            continue
        yield candidate


class FixedChooser:
    """Takes the values of a record. KeyError: a hole the record lacks; ValueError: a value the hole lacks."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def choice(self, name: str, options: Sequence[Any]) -> int:
        wanted = json.dumps(self.values[name], sort_keys=True)
        for i, option in enumerate(options):
            if json.dumps(option, sort_keys=True) == wanted:
                return i
        raise ValueError(f"{name}: {self.values[name]!r} is no longer an option")

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        value = self.values[name]
        if not isinstance(value, int) or not low <= value <= high or (value - low) % step:
            raise ValueError(f"{name}: {value!r} is no longer in the range")
        return value

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        value = float(self.values[name])
        if not low <= value <= high:
            raise ValueError(f"{name}: {value!r} is no longer in the range")
        return value


class _Odometer:
    """Replays a prefix of option numbers, then zeros; remembers how many options each hole had."""

    def __init__(self, prefix: list[int]) -> None:
        self.taken: list[int] = []
        self.sizes: list[int] = []
        self.prefix = prefix

    def _next(self, size: int) -> int:
        at = len(self.taken)
        picked = self.prefix[at] if at < len(self.prefix) else 0
        self.taken.append(picked)
        self.sizes.append(size)
        return picked

    def choice(self, name: str, options: Sequence[Any]) -> int:
        return self._next(len(options))

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return low + step * self._next((high - low) // step + 1)

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        if log or step is None:
            raise Uncountable
        return low + step * self._next(int((high - low) / step + 1e-9) + 1)


class Uncountable(Exception):
    """The space has a continuous hole."""


def enumerate_space(space: SearchSpace) -> Iterator[Candidate | None]:
    """Every combination of hole values in order; None stands for one that makes no architecture.

    Raises Uncountable if a hole is continuous.
    """
    prefix: list[int] = []
    while True:
        odometer = _Odometer(prefix)
        try:
            yield space.sample(odometer)
        except SpaceError:
            yield None
        taken, sizes = odometer.taken, odometer.sizes
        while taken and taken[-1] + 1 == sizes[len(taken) - 1]:
            taken.pop()
        if not taken:
            return
        prefix = [*taken[:-1], taken[-1] + 1]
