"""What a front can have as axes, by name. Each objective says its unit, its direction and when it can be read.

stage `graph`: from the resolved model alone, before any tensor exists · `bench`: measured with random weights at the
workload's scale · `trained`: after training at proxy scale. What is cheap comes first, so that a limit saves training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from archsearch import cost
from archsearch.architecture import Architecture, ModelSpec
from archsearch.notation import COUNTED, quantity, tick_label
from archsearch.registry import Registry
from archsearch.settings import Goal
from archsearch.store.record import NOISY

if TYPE_CHECKING:
    from archsearch.latency.measure import Bench


@dataclass(frozen=True)
class Reading:
    """A measured value: `spread` in the same unit (latency: half of p10 to p90), `n` repeats."""

    value: float
    spread: float | None = None
    n: int = 1


@dataclass(frozen=True)
class Objective:
    """`read` gets the model (graph), a Bench (bench) or the metrics of a trained trial (trained), and the goal."""

    name: str
    unit: str
    goal: Literal["min", "max"]
    stage: Literal["graph", "bench", "trained"]
    scale: Literal["proxy", "target"]
    read: Callable[[Any, Goal, int], Reading]
    what: str


def _context(model: ModelSpec, goal: Goal) -> int:
    return goal.at.context or model.context


def _params(model: ModelSpec, goal: Goal, repeats: int) -> Reading:
    return Reading(cost.params(model))


def _active_params(model: ModelSpec, goal: Goal, repeats: int) -> Reading:
    return Reading(cost.active_params(model))


def _flops_per_token(model: ModelSpec, goal: Goal, repeats: int) -> Reading:
    return Reading(cost.flops_per_token(model, _context(model, goal)))


def _state_bytes(model: ModelSpec, goal: Goal, repeats: int) -> Reading:
    return Reading(cost.state_bytes(model, _context(model, goal), goal.at.batch))


def _timed(measure: str) -> Callable[[Any, Goal, int], Reading]:
    def read(bench: Bench, goal: Goal, repeats: int) -> Reading:
        context = _context(bench.spec, goal)
        timing = getattr(bench, measure)(context=context, batch=goal.at.batch, repeats=repeats)
        return Reading(timing.p50, (timing.p90 - timing.p10) / 2, timing.n)

    return read


def _peak_memory(bench: Bench, goal: Goal, repeats: int) -> Reading:
    return Reading(bench.peak_memory(context=_context(bench.spec, goal), batch=goal.at.batch))


def _metric(name: str) -> Callable[[Any, Goal, int], Reading]:
    def read(metrics: Mapping[str, float], goal: Goal, repeats: int) -> Reading:
        return Reading(metrics[name])

    return read


VAL_BPB = Objective("val_bpb", "bits/byte", "min", "trained", "proxy", _metric("val_bpb"), "held-out bits per byte")
VAL_LOSS = Objective("val_loss", "nats/token", "min", "trained", "proxy", _metric("val_loss"), "held-out loss")
PREFILL_MS = Objective("prefill_ms", "ms", "min", "bench", "target", _timed("prefill"), "prompt of `context` tokens")
DECODE_MS = Objective("decode_ms", "ms", "min", "bench", "target", _timed("decode"), "one token, cache full")
TRAIN_STEP_MS = Objective(
    "train_step_ms", "ms", "min", "bench", "target", _timed("train_step"), "forward, backward, update"
)
PARAMS = Objective("params", "parameters", "min", "graph", "target", _params, "all parameters")
ACTIVE_PARAMS = Objective("active_params", "parameters", "min", "graph", "target", _active_params, "used per token")
FLOPS_PER_TOKEN = Objective("flops_per_token", "FLOPs", "min", "graph", "target", _flops_per_token, "forward, average")
STATE_BYTES = Objective("state_bytes", "bytes", "min", "graph", "target", _state_bytes, "caches and states")
PEAK_MEMORY = Objective("peak_memory", "bytes", "min", "bench", "target", _peak_memory, "decoding, weights included")

OBJECTIVES = Registry(
    "objective",
    {
        name.lower(): f"archsearch.objectives:{name}"
        for name in (
            "VAL_BPB",
            "VAL_LOSS",
            "PREFILL_MS",
            "DECODE_MS",
            "TRAIN_STEP_MS",
            "PARAMS",
            "ACTIVE_PARAMS",
            "FLOPS_PER_TOKEN",
            "STATE_BYTES",
            "PEAK_MEMORY",
        )
    },
    group="archsearch.objectives",
    check=lambda found, name: None if isinstance(found, Objective) else "is no archsearch.objectives.Objective",
)


def objective(goal: Goal) -> Objective:
    """The objective a goal names; raises UserError."""
    found: Objective = OBJECTIVES.load(goal.name)
    return found


def direction(goal: Goal) -> Literal["min", "max"]:
    """The goal's direction: its own, or the objective's."""
    return goal.goal or objective(goal).goal


def scale_of(goal: Goal) -> str:
    """The scale a goal is read at: its own, or the objective's."""
    return goal.at.scale or objective(goal).scale


def axis_name(goal: Goal, goals: tuple[Goal, ...]) -> str:
    """A name for the axis that is unique among `goals`: the objective's, with its workload where it must."""
    if sum(other.name == goal.name for other in goals) == 1:
        return goal.name
    at = goal.at
    parts = [
        goal.name,
        scale_of(goal),
        *([f"c{at.context}"] if at.context else []),
        *([f"b{at.batch}"] if at.batch > 1 else []),
        *([at.device] if at.device else []),
    ]
    return "_".join(parts)


def devices_of(goals: tuple[Goal, ...]) -> tuple[str, ...]:
    """The kinds of device that measured objectives name, in order; empty where the study has one for all."""
    return tuple(dict.fromkeys(goal.at.device for goal in goals if goal.at.device is not None))


def exceeds(goal: Goal, value: float) -> bool:
    """Whether a value lies beyond the goal's limit."""
    if goal.limit is None:
        return False
    return value > goal.limit if direction(goal) == "min" else value < goal.limit


def read_layout(goal: Goal, architecture: Architecture) -> Reading:
    """An objective of stage graph, before any tensor exists."""
    return objective(goal).read(architecture.at(scale_of(goal)), goal, 1)


@dataclass(frozen=True)
class Beyond:
    """A limit that is broken: `limit` as a rule (`params <= 20M`), `why` in words, and by how much, in its unit."""

    limit: str
    why: str
    by: float


def beyond_limit(goals: tuple[Goal, ...], architecture: Architecture) -> Beyond | None:
    """The first limit that an architecture breaks by itself, before any tensor exists."""
    for goal in goals:
        if goal.limit is not None and objective(goal).stage == "graph":
            value = read_layout(goal, architecture).value
            if exceeds(goal, value):
                axis = axis_name(goal, goals)
                sign = "<=" if direction(goal) == "min" else ">="
                limit = f"{axis} {sign} {tick_label(goal.limit, objective(goal).unit)}"
                return Beyond(limit, beyond(goal, axis, value), abs(value - goal.limit))
    return None


def beyond(goal: Goal, axis: str, value: float, spread: float | None = None) -> str:
    """What is said of a value beyond its limit."""
    unit = objective(goal).unit
    assert goal.limit is not None
    word = "" if unit == "bytes" or unit in COUNTED else f" {unit}"
    return f"{axis} {quantity(value, unit, spread)}{word} is beyond the limit {tick_label(goal.limit, unit)}"


def in_doubt(goal: Goal, reading: Reading) -> bool:
    """Whether a value beyond its limit may be there by noise: it is noisy, or its spread reaches back to the limit."""
    if not reading.spread or not exceeds(goal, reading.value):
        return False
    assert goal.limit is not None
    return reading.spread > min(NOISY * abs(reading.value), abs(reading.value - goal.limit))
