"""Tasks by name: what a model is trained on (a loss) and judged by (metrics).

Which mixers a task admits is the graph's business. To add a task: a file here, a line below, a literal in settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from archsearch.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from archsearch.model import HybridLM


@dataclass(frozen=True)
class TensorBatch:
    """One batch on the model's device; `target_bytes` is the length of all its targets as text."""

    inputs: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    target_bytes: int
    seq_idx: Tensor | None = None  # [B, T] int32, numbers of the packed documents


class Task(Protocol):
    """A loss to train on and metrics to judge by."""

    def loss(self, model: HybridLM, batch: TensorBatch) -> Tensor:
        """Mean loss of a batch in nats per token: a differentiable fp32 scalar."""

    def metrics(self, model: HybridLM, batches: Iterable[TensorBatch]) -> dict[str, float]:
        """What the task reports of the held-out text, by name. Called without gradients and in eval mode."""


TASKS = Registry("task", {"causal_lm": "archsearch.tasks.causal_lm:CausalLM"}, group="archsearch.tasks")
