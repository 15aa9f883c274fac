"""Training one model: a plain loop with AdamW, a schedule over the whole budget, and a stop at any step.

Weight decay is decoupled (1711.05101) and not scaled with the width (2405.13698); the learning rate of each matrix
follows the width (2203.03466), as `archsearch.model.width_multipliers` and docs/design/0003-width.md say.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from archsearch.architecture import ModelSpec
from archsearch.checkpoint import Checkpoint, Progress, capture, restore
from archsearch.data import Batch, Corpus
from archsearch.errors import NonFiniteError
from archsearch.model import HybridLM, hidden_matrices, width_multipliers
from archsearch.optimizer import AdamW
from archsearch.settings import Train
from archsearch.step import make_step
from archsearch.tasks import TASKS, Task, TensorBatch

CURVE_POINTS = 200
STEPS_PER_SYNC = 16  # steps queued on an accelerator before the host reads their losses
SAVE_SECONDS = 60.0  # a training that is killed loses at most about this much
SAVE_SHARE = 20  # times as long as a checkpoint took to write, at least, before the next


class Lock(Protocol):
    """Many may train at once; whoever times a model wants the device alone."""

    def shared(self) -> AbstractContextManager[object]:
        """Held while steps run."""


@dataclass(frozen=True)
class TrainResult:
    """What came of a training.

    tokens, steps: since the very start, before a resume too. curve: (tokens, loss in nats per token), at most 200
    points. tokens_per_s: from the median step, data included and waiting for the lock not. peak_memory_bytes: the
    allocator's on CUDA, the process's resident memory elsewhere. finished: the whole budget is used up.
    """

    tokens: int
    steps: int
    curve: tuple[tuple[int, float], ...]
    tokens_per_s: float
    peak_memory_bytes: int
    finished: bool
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Plan:
    """Tokens to steps. The last step may overshoot the budget by part of a batch."""

    batch_size: int
    tokens_per_step: int
    total_steps: int

    @classmethod
    def of(cls, settings: Train, context: int) -> Plan:
        """Rows of `context` tokens, as many as make up batch_tokens, and at least one."""
        step = settings.step_tokens(context)
        return cls(step // context, step, math.ceil(settings.tokens / step))

    def steps(self, tokens: int) -> int:
        """Steps after which at least `tokens` were seen, within the budget."""
        return min(self.total_steps, math.ceil(tokens / self.tokens_per_step))


def train(
    model: HybridLM,
    spec: ModelSpec,
    corpus: Corpus,
    settings: Train,
    *,
    device: str | torch.device,
    until_tokens: int | None = None,
    resume: Checkpoint | None = None,
    lock: Lock | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> TrainResult:
    """Train `model` (built from `spec`, on `device`) from the start or from `resume` until `until_tokens`.

    Stopping and going on later, in any process, gives the same model as not stopping: bit for bit on the CPU. The
    schedule is that of the whole budget, `settings.tokens`, wherever the stop is. `lock.shared()` is held around one
    step on the CPU and around STEPS_PER_SYNC of them on an accelerator, which is idle when it is let go.
    `on_step(step, tokens, loss)` is told of every step, and `save` gets a checkpoint of the training on its way every
    `save_seconds`, or less often where saving takes long. The caller's random state is left as it was.

    Raises NonFiniteError with the step if the loss or the gradient norm became NaN or infinite, RunError if `resume`
    is of another architecture, other settings or another corpus.
    """
    device = torch.device(device)
    plan = Plan.of(settings, spec.context)
    stop = plan.total_steps if until_tokens is None else plan.steps(until_tokens)
    every = max(1, math.ceil(plan.total_steps / CURVE_POINTS))
    task: Task = TASKS.load(spec.task)()
    optimizer = make_optimizer(model, settings)
    balanced: list[Any] = [m for m in model.modules() if hasattr(m, "update_bias")]
    forward_and_backward = make_step(model, task, settings.grad_clip, autocast(device), device)
    free = nullcontext()
    progress = Progress()
    model.train()
    _forget_peak(device)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        if resume is not None:
            resume.check(spec, settings, corpus.sha256)
            restore(resume, model, optimizer)
            progress = resume.progress
        step, curve = progress.step, list(progress.curve)
        step_seconds: list[float] = []

        def standing() -> Checkpoint:
            median = statistics.median(step_seconds) if step_seconds else progress.seconds_per_step
            return capture(model, optimizer, spec, settings, corpus.sha256, Progress(step, median, tuple(curve)))

        save_at = time.monotonic() + save_seconds

        while step < stop:
            until = min(stop, step + (1 if device.type == "cpu" else STEPS_PER_SYNC))
            queued: list[Tensor] = []
            with lock.shared() if lock is not None else free:
                began = time.perf_counter()
                for at in range(step, until):
                    numpy_batch = corpus.train_batch(
                        at, batch_size=plan.batch_size, context=spec.context, seed=settings.seed
                    )
                    batch = to_device(numpy_batch, device)
                    queued.append(forward_and_backward(batch))
                    lr = settings.lr * schedule(settings, at, plan.total_steps)
                    for group in optimizer.param_groups:
                        group["lr"] = lr * group["lr_scale"]
                    optimizer.step()
                    forward_and_backward.clear()
                    for module in balanced:
                        module.update_bias()
                read: list[tuple[float, float]] = torch.stack(queued).tolist()  # waits for the device, once
                step_seconds.append((time.perf_counter() - began) / len(read))
            for loss_read, norm_read in read:
                for what, value in (("loss", loss_read), ("gradient norm", norm_read)):
                    if not math.isfinite(value):
                        raise NonFiniteError(what, step + 1)
                step += 1
                tokens = step * plan.tokens_per_step
                if (plan.total_steps - step) % every == 0:
                    curve.append((tokens, loss_read))
                if on_step is not None:
                    on_step(step, tokens, loss_read)
            if save is not None and step < stop and (now := time.monotonic()) >= save_at:
                save(standing())
                save_at = time.monotonic() + max(save_seconds, SAVE_SHARE * (time.monotonic() - now))

        optimizer.zero_grad()
        checkpoint = standing()
    usual = checkpoint.progress.seconds_per_step
    return TrainResult(
        tokens=step * plan.tokens_per_step,
        steps=step,
        curve=checkpoint.progress.curve,
        tokens_per_s=plan.tokens_per_step / usual if usual else 0.0,
        peak_memory_bytes=_peak_bytes(device),
        finished=step == plan.total_steps,
        checkpoint=checkpoint,
    )


def evaluate(
    model: HybridLM,
    spec: ModelSpec,
    corpus: Corpus,
    settings: Train,
    *,
    device: str | torch.device,
    lock: Lock | None = None,
) -> dict[str, float]:
    """The task's metrics over the first `settings.val_tokens` of the held-out text, in fixed windows.

    For causal_lm: val_loss (nats per token), val_bpb (bits per byte), val_tokens. Leaves the model in its mode.
    """
    device = torch.device(device)
    task: Task = TASKS.load(spec.task)()
    plan = Plan.of(settings, spec.context)
    batches = corpus.val_batches(batch_size=plan.batch_size, context=spec.context, max_tokens=settings.val_tokens)
    free = nullcontext()

    def under_lock() -> Generator[TensorBatch]:
        for batch in batches:
            with lock.shared() if lock is not None else free:
                yield to_device(batch, device)  # what is done with it, until the next one is asked for, is in the lock
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

    training = model.training
    model.eval()
    try:
        with closing(under_lock()) as held, torch.no_grad(), autocast(device):
            return task.metrics(model, held)
    finally:
        model.train(training)


def schedule(settings: Train, step: int, total: int) -> float:
    """Share of the learning rate at `step` (from 0) of `total`; positive throughout.

    A linear warm-up, then: `wsd` stays and falls over the last `decay` of the steps as 1 - sqrt (2405.18392),
    `cosine` falls to 0 by half a cosine, `constant` stays.
    """
    warmup = round(settings.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    left = total - step
    falling = round(settings.decay * total)
    if settings.schedule == "wsd" and left < falling:
        return 1 - math.sqrt(1 - left / falling)
    return 1.0


def make_optimizer(model: HybridLM, settings: Train) -> AdamW:
    """AdamW whose groups carry the width's factor of the learning rate as `lr_scale`.

    Matrices decay and nothing else does: not the embedding (nor a head tied to it), norms, convolutions, biases. AdamW
    decays by lr * weight_decay; dividing by the factor keeps that product the same at every width (2405.13698).
    """
    hidden, scales = hidden_matrices(model.spec), width_multipliers(model.spec)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((scales[name], name in hidden or name in linear), []).append((name, parameter))
    return AdamW(
        [
            {"params": named, "lr_scale": scale, "weight_decay": settings.weight_decay / scale if decays else 0.0}
            for (scale, decays), named in groups.items()
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=True,  # one pass over each tensor: several times faster for small models, on the CPU too
    )


def to_device(batch: Batch, device: torch.device) -> TensorBatch:
    """A numpy batch as tensors, copied without waiting for what the device is still doing."""

    def move(array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    seq_idx = None if batch.seq_idx is None else move(batch.seq_idx)
    return TensorBatch(move(batch.inputs), move(batch.targets), batch.target_bytes, seq_idx)


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bf16 on a GPU that has it; weights, moments and the loss stay in fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and has_bf16)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it: then the mark is that of the process's whole life
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, where it cannot be reset
