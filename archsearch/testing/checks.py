"""What the contract tests measure with: tolerances, seeded inputs, counted FLOPs, imports of a file."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archsearch.contract import ModuleCall

EXACT = 1e-6  # same numbers but for the order of sums: a chunk's stabiliser or an expert's batch may regroup them
EQUAL = 1e-5  # two float32 algorithms for one function, relative to the largest output
NEAR = 0.05  # bfloat16 against float32, relative, at nine tokens of ten: a router may tip over at a near tie


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b where that exceeds 1; NaN is infinitely far."""
    if a.numel() == 0:
        return 0.0
    apart = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)
    return apart.nan_to_num(float("inf")).item()


def is_near(low: Tensor, high: Tensor) -> bool:
    """Whether a bfloat16 result is finite and close to the float32 one at 90 % of the tokens."""
    error = (low.double() - high.double()).norm(dim=-1) / high.double().norm(dim=-1)
    return bool(low.isfinite().all()) and error.flatten().quantile(0.9).item() <= NEAR


def pieces(length: int, seed: int) -> list[int]:
    """Random piece lengths that add up to `length`; single tokens among them, because they take the `step` path."""
    cuts = torch.randint(0, length, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = sorted({0, length, *cuts, min(length, max(cuts) + 1)})
    return [b - a for a, b in itertools.pairwise(bounds)]


def packed(rows: Sequence[Sequence[int]]) -> Tensor:
    """seq_idx [B, T] of rows of document lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def multiply_flops(module: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of all matrix products that `run()` does, and of the `nn.Linear` among them."""
    linear = 0

    def add(layer: Any, arguments: tuple[Tensor], _: Tensor) -> None:
        nonlocal linear
        linear += 2 * arguments[0].numel() * layer.out_features

    hooks = [m.register_forward_hook(add) for m in module.modules() if isinstance(m, nn.Linear)]
    # the counter knows no fused attention on the CPU; the plain one is two products it does know
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flops})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), linear


def _grouped_mm_flops(a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """a [N, in] times, group by group, b [E, in, out]; torch's counter has no entry for it."""
    return 2 * math.prod(a) * b[-1]


def calls(call: ModuleCall) -> Iterator[ModuleCall]:
    """A call and those in its arguments."""
    yield call
    todo: list[Any] = [call.arguments]
    while todo:
        value = todo.pop()
        if isinstance(value, ModuleCall):
            yield from calls(value)
        elif isinstance(value, dict | list):
            todo += value.values() if isinstance(value, dict) else value


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, at its top or anywhere inside; a relative import keeps its dots."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that what initialisation forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
