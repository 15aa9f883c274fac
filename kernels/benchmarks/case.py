"""What a benchmark is: an operation at a shape, its inputs, reference and peers, and the least work it could do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from archsearch_kernels.tuner.workload import Workload

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

    @property
    def name(self) -> str:
        """Operation and shape."""
        return f"{self.op} {self.shape}"


def first(out: Any) -> Tensor:
    """The output among what an operation returns."""
    tensor = out[0] if isinstance(out, tuple | list) else out
    assert isinstance(tensor, Tensor)
    return tensor


def step(case: Case, run: Callable[..., Any], inputs: Inputs, cotangent: Tensor | None = None) -> Callable[[], Any]:
    """Forward, and backward where the case has one, of fixed inputs; gradients are dropped before each."""
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    if not case.backward:

        def forward() -> Any:
            with torch.no_grad():
                return run(**inputs)

        return forward
    with torch.no_grad():
        d = torch.randn_like(first(run(**inputs))) if cotangent is None else cotangent

    def both() -> Any:
        for leaf in leaves:
            leaf.grad = None
        out = first(run(**inputs))
        out.backward(d)
        return out

    return both


def results(case: Case, run: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients of `run`, under a cotangent that every implementation gets alike."""
    fresh = {
        name: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
    if not case.backward:
        with torch.no_grad():
            return {"output": first(run(**fresh)).clone()}
    out = first(run(**fresh))
    generator = torch.Generator(out.device).manual_seed(0)
    out.backward(torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype))
    grads = {n: x.grad for n, x in fresh.items() if isinstance(x, Tensor) and x.grad is not None}
    return {"output": out.detach(), **{f"gradient of {n}": g for n, g in grads.items() if g is not None}}


def workload(module: str, index: int) -> Workload:
    """Case number `index` of a module's CASES, to be tuned."""
    case: Case = importlib.import_module(module).CASES[index]
    torch.manual_seed(0)
    inputs, small = case.inputs(), case.small()
    return Workload(
        run=step(case, case.run, inputs),
        check=lambda: results(case, case.run, small),
        expected=lambda: results(case, case.reference, small),
        tolerance=case.tolerance,
    )
