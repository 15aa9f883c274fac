"""Choosers that between them take every option of every hole, so that a mistake in any option shows at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class Planned:
    """Takes the options planned by name, else the first; of a range its ends. Notes how many each hole has."""

    def __init__(self, plan: dict[str, int]) -> None:
        self.plan = plan
        self.asked: dict[str, int] = {}

    def choice(self, name: str, options: Sequence[Any]) -> int:
        self.asked[name] = len(options)
        return self.plan.get(name, 0)

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return high if self._is_high(name) else low

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        return high if self._is_high(name) else low

    def _is_high(self, name: str) -> bool:
        self.asked[name] = 2
        return self.plan.get(name, 0) == 1


def every_option() -> Iterator[Planned]:
    """As many choosers as it takes; each must fill the space before the next is asked for.

    A fill shows which holes there are, nested ones only behind their option. An option that no fill has taken yet gets
    a fill of its own: the one that showed it, with this option changed. Holes asked for per block (`name@3`) are one.
    """
    taken: set[tuple[str, int]] = set()
    plans: list[dict[str, int]] = [{}]
    while plans:
        chooser = Planned(plans.pop())
        yield chooser
        for name, n_options in chooser.asked.items():
            hole = name.split("@")[0]
            here = chooser.plan.get(name, 0)
            new = [i for i in range(n_options) if i != here and (hole, i) not in taken]
            plans += [{**chooser.plan, name: i} for i in new]
            taken.update((hole, i) for i in range(n_options))
