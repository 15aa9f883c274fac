"""What is tuned: some work that launches kernels, and how to tell that it is right.

A workload travels to a timing process as data: the name of a function that makes it, and that function's arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """Work at the size that counts, and the same at a small ragged size that the reference can follow.

    run(): makes every launch to be tuned, once. check(): output and gradients at the small size, by name, from the
    kernels; expected(): the same numbers from the reference. tolerance: root-mean-square error, relative: of all, or
    of each by its name; a function if it takes work to find out.
    """

    run: Callable[[], object]
    check: Callable[[], Mapping[str, Tensor]]
    expected: Callable[[], Mapping[str, Tensor]]
    tolerance: float | Mapping[str, float] | Callable[[], Mapping[str, float]] = 2e-2

    def allowed(self, name: str) -> float:
        """The tolerance of one number."""
        found = self.tolerance() if callable(self.tolerance) else self.tolerance
        return found if isinstance(found, float) else found[name]


@dataclass(frozen=True)
class Job:
    """A workload as plain data.

    maker: "module:function". name: for people. code: a digest of the code on which its launches depend, this package's
    apart; empty: unknown.
    """

    maker: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    code: str = ""

    def make(self) -> Workload:
        """Import the function and call it."""
        module, _, function = self.maker.partition(":")
        made = getattr(importlib.import_module(module), function)(**self.arguments)
        assert isinstance(made, Workload)
        return made


def distance(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected; NaN is infinitely far."""
    apart = (got.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt().clamp(min=1e-6)
    return float((apart / size).nan_to_num(float("inf")))
