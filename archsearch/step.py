"""A training step up to the gradients: forward, loss, backward and clipping, from Python or as a CUDA graph.

A small model's step is a thousand kernels that take the device less time than Python takes to ask for them. On CUDA
they are therefore captured once and replayed. A model that cannot be captured (a task or mixer that waits for the
device) runs from Python, and that is said once. ARCHSEARCH_GRAPHS=off runs every model from Python.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from archsearch.model import HybridLM
from archsearch.tasks import Task, TensorBatch
from archsearch_kernels.capture import renew_generator

log = logging.getLogger("archsearch")
_uncapturable: WeakSet[HybridLM] = WeakSet()
WARM_UPS = 2  # steps that compile kernels and allocate workspaces before a capture


class Step:
    """Calling it with a batch leaves clipped gradients in the parameters; returns [loss, gradient norm] in fp32.

    The loss is the task's, in nats per token, without what routers add to it. `clear()` follows the optimizer's step.
    """

    def __init__(self, model: HybridLM, task: Task, grad_clip: float, lower: AbstractContextManager[Any]) -> None:
        self.model, self.task, self.grad_clip, self.lower = model, task, grad_clip, lower
        self.parameters = list(model.parameters())
        self.routers: list[Any] = [m for m in model.modules() if hasattr(m, "router_loss")]

    def __call__(self, batch: TensorBatch) -> Tensor:
        with self.lower:
            loss = self.task.loss(self.model, batch)
        extra = [m.router_loss for m in self.routers if m.router_loss is not None]
        sum(extra, start=loss).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        return torch.stack((loss.detach(), norm))

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class GraphedStep(Step):
    """The same, replayed. Every batch has the shape of the first; `graphed` says whether the capture worked."""

    graphed: bool | None = None

    def __call__(self, batch: TensorBatch) -> Tensor:
        if self.graphed is None:
            self.graphed = self._capture(batch)
        if not self.graphed:
            return super().__call__(batch)
        for name in ("inputs", "targets", "seq_idx"):
            if (given := getattr(batch, name)) is not None:
                getattr(self.batch, name).copy_(given)
        self.graph.replay()
        return self.out.clone()

    def clear(self) -> None:
        """A replay writes its gradients anew."""
        if not self.graphed:
            super().clear()

    def _capture(self, batch: TensorBatch) -> bool:
        self.batch = replace(
            batch,
            inputs=batch.inputs.clone(),
            targets=batch.targets.clone(),
            seq_idx=None if batch.seq_idx is None else batch.seq_idx.clone(),
        )
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # a router counts its tokens
        device = batch.inputs.device
        random = torch.cuda.get_rng_state(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            captured = self._record(before)
            if not captured:
                renew_generator()
                torch.cuda.set_rng_state(random, device)
        return captured

    def _record(self, before: list[tuple[Tensor, Tensor]]) -> bool:
        try:
            aside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    super().__call__(self.batch)
                    super().clear()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self.graph):
                self.out = super().__call__(self.batch)
        except RuntimeError as problem:
            torch.cuda.synchronize()
            log.warning("training runs from Python, not as a CUDA graph: %s", str(problem).partition("\n")[0])
            super().clear()
            _uncapturable.add(self.model)  # a training goes on in several calls
            return False
        finally:
            for buffer, value in before:
                buffer.copy_(value)
        return True


def make_step(model: HybridLM, task: Task, grad_clip: float, lower: torch.autocast, device: torch.device) -> Step:
    """A graph on CUDA, unless ARCHSEARCH_GRAPHS is `off`; raises ValueError if that is neither `on` nor `off`."""
    wanted = os.environ.get("ARCHSEARCH_GRAPHS", "on")
    if wanted not in ("on", "off"):
        raise ValueError(f"ARCHSEARCH_GRAPHS is '{wanted}'; expected on or off")
    graphed = device.type == "cuda" and wanted == "on" and model not in _uncapturable
    kind = GraphedStep if graphed else Step
    return kind(model, task, grad_clip, lower)
