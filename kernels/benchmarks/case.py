"""What a benchmark is: an operation at a shape, its inputs, its reference, its peers, and the least work it could do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    inputs(): tensors on the current CUDA device, by name; those that require grad get gradients. run, reference and
    peers take them as keywords and return a tensor or a tuple whose first is the output. `small` makes inputs of the
    same kind that the reference can check in a second. flops and bytes: of the forward, and of forward and backward
    together (the floor: each input once, each output once). A peer that cannot be imported or refuses is a note.
    """

    op: str
    shape: str
    inputs: Callable[[], Inputs]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    small: Callable[[], Inputs]
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    flops: tuple[float, float] = (0.0, 0.0)
    bytes: tuple[float, float] = (0.0, 0.0)
    backward: bool = True
    graphed: bool = False  # timed as a CUDA graph: decode steps, which launches would hide
    against: str | None = None  # the peer that the goal names
    goal: float | None = None  # at most this many times the peer's time (forward and backward where there is one)
    tolerance: float = 2e-2  # root-mean-square error of outputs and gradients against the reference
