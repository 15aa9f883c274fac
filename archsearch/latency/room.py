"""What a model takes at least, known before a tensor exists and without torch; `archsearch.machine` says what there is.

A model that cannot fit is refused for what it is. Tried, it would drive the machine into swapping for minutes and end
by the kernel's hand, which looks like a crash.
"""

from __future__ import annotations

from archsearch import cost
from archsearch.architecture import DTYPE_BYTES, ModelSpec
from archsearch.notation import in_bytes, si

COPIES = 4  # of the parameters in a training: themselves, gradients, AdamW's two moments
WITH_STATE = ("prefill_ms", "decode_ms", "peak_memory")


def bench_bytes(model: ModelSpec, objective: str, context: int | None, batch: int) -> int:
    """Bytes that measuring an objective takes at least; activations come on top."""
    weights = cost.weight_bytes(model)
    if objective in WITH_STATE:
        return weights + cost.state_bytes(model, context, batch)
    return COPIES * weights if objective == "train_step_ms" else weights


def train_bytes(model: ModelSpec) -> int:
    """Bytes that a trial's training takes at least, in float32; activations come on top."""
    return COPIES * cost.params(model) * DTYPE_BYTES["float32"]


def too_big(model: ModelSpec, what: str, least: int, room: int) -> str:
    """That `least` bytes for `what` are more than `room`, in a sentence without its full stop."""
    size = f"{si(cost.params(model))} parameters, {model.dtype}"
    return f"{what} ({size}) takes at least {in_bytes(least)} and the device has {in_bytes(room)}"
