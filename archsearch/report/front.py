"""From trial records to the front: which points are on it, how surely, what they tie with, what volume they cover."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from archsearch import pareto
from archsearch.notation import quantity
from archsearch.report.blocks import describe
from archsearch.report.picks import picked
from archsearch.store import TrialRecord

NEAR = 0.05  # a dominated point with at least this chance to be on the front is drawn as "not told apart from it"
COSTS = (
    "params_proxy",
    "params_target",
    "active_params_target",
    "state_bytes_target",
    "flops_per_token_target",
)


@dataclass(frozen=True)
class Axis:
    """One objective, as settings.json describes it."""

    name: str
    goal: Literal["min", "max"]
    unit: str = ""
    scale: str | None = None
    context: int | None = None
    batch: int | None = None
    limit: float | None = None

    @classmethod
    def read(cls, goal: Mapping[str, Any]) -> Axis:
        """An entry of settings.json's `objectives`; what else it may say is not needed here."""
        return cls(**{f.name: goal[f.name] for f in fields(cls) if f.name in goal})

    @property
    def where(self) -> str:
        """The workload it is read at: `target, context 32768, batch 1`."""
        parts = [self.scale, self.context and f"context {self.context}", self.batch and f"batch {self.batch}"]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Point:
    """A complete trial. `number` counts the front's points along the second axis; `probability`: of being on the
    front given the measured noise, None if no noise was measured; `tied_with`: arch_ids that cannot be told apart.
    `sigma`: by axis the standard deviation that both are reckoned with, 0 where none was measured.
    """

    record: TrialRecord
    number: int | None
    probability: float | None
    tied_with: tuple[str, ...]
    sigma: Mapping[str, float]

    def show(self, axis: Axis) -> str:
        """Its value on an axis, with the deviation that everything else here is reckoned with."""
        measured = self.record.objectives[axis.name]
        return quantity(measured.value, axis.unit, self.sigma[axis.name]) + (" noisy" if measured.is_noisy else "")

    @property
    def on_front(self) -> bool:
        """Whether no other point dominates its measured values."""
        return self.number is not None

    @property
    def is_near(self) -> bool:
        """Dominated, but by less than the noise allows to say."""
        return self.number is None and self.probability is not None and self.probability >= NEAR

    @property
    def is_baseline(self) -> bool:
        """Whether it is a recipe."""
        return self.record.name is not None

    @property
    def label(self) -> str:
        """The recipe's name, or the number on the front, or the trial."""
        return self.record.name or (str(self.number) if self.number is not None else f"trial {self.record.trial}")


@dataclass(frozen=True)
class Front:
    """Everything the report shows. `points`: complete trials in order; `reference` is in the axes' own units.

    spreads: median standard deviation by axis, where one was measured. between: by axis the standard deviation of one
    baseline's values over its seeds, as a share of their mean, where repeated timings spread less than that. left_out:
    complete trials that cannot be compared because an objective is missing. refused_noisily: trials beyond a limit by a
    value that is noisy.
    """

    study: str
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    reference: dict[str, float]
    hypervolume: float
    spreads: dict[str, float]
    n_trials: dict[str, int]
    left_out: int
    n_seeds: int = 1
    refused_noisily: int = 0
    between: Mapping[str, float] = field(default_factory=dict)

    @property
    def members(self) -> list[Point]:
        """The points on the front, by number."""
        return sorted((p for p in self.points if p.number is not None), key=lambda p: p.number or 0)

    @property
    def baselines(self) -> list[Point]:
        """The recipes, on the front or not."""
        return [p for p in self.points if p.is_baseline]

    def costs(self, points: Sequence[Point]) -> pareto.Floats:
        """Objective values as a matrix to minimise."""
        return pareto.to_minimise(
            [[p.record.objectives[axis.name].value for axis in self.axes] for p in points],
            [axis.goal for axis in self.axes],
        )


def build_front(records: Sequence[TrialRecord], settings: Mapping[str, Any]) -> Front:
    """The front of a study's records; `settings` is its settings.json."""
    axes = tuple(Axis.read(goal) for goal in settings["objectives"])
    complete = [r for r in records if r.status == "complete" and r.repeat_of is None]
    repeats = [r for r in records if r.status == "complete" and r.repeat_of is not None]
    compared = [r for r in complete if all(axis.name in r.objectives for axis in axes)]
    goals = [axis.goal for axis in axes]
    values = pareto.to_minimise([[r.objectives[axis.name].value for axis in axes] for r in compared], goals)
    sigma, spreads, between = _noise(compared, repeats, axes)
    members = pareto.front(values)
    along = axes[1 if len(axes) > 1 else 0].name
    order = sorted(members, key=lambda i: (compared[i].objectives[along].value, compared[i].trial))
    numbers = {int(i): place for place, i in enumerate(order, 1)}
    probability = pareto.membership(values, sigma) if spreads else None
    drawn = _drawn(compared, numbers, probability)
    together = pareto.tied(values[drawn], sigma[drawn])
    ties = {
        i: tuple(compared[drawn[j]].arch_id for j in np.flatnonzero(row))
        for i, row in zip(drawn, together, strict=True)
    }
    points = tuple(
        Point(
            record=r,
            number=numbers.get(i),
            probability=None if probability is None else round(float(probability[i]), 3),
            tied_with=ties.get(i, ()),
            sigma={axis.name: float(sigma[i, k]) for k, axis in enumerate(axes)},
        )
        for i, r in enumerate(compared)
    )
    worst = _reference(values)
    signs = [1.0 if goal == "min" else -1.0 for goal in goals]
    return Front(
        study=str(settings.get("name", "")),
        axes=axes,
        points=points,
        reference={axis.name: float(s * w) for axis, s, w in zip(axes, signs, worst, strict=True)} if points else {},
        hypervolume=pareto.hypervolume(values, worst) if points else 0.0,
        spreads=spreads,
        n_trials=dict(Counter(r.status for r in records)),
        left_out=len(complete) - len(compared),
        n_seeds=1 + len(repeats),
        between=between,
        refused_noisily=sum(_is_beyond_noisily(r, axes) for r in records),
    )


def _is_beyond_noisily(record: TrialRecord, axes: Sequence[Axis]) -> bool:
    """Whether a trial was refused by a limit on a value that is noisy: a quiet device may have let it pass."""
    found = [(axis, record.objectives[axis.name]) for axis in axes if axis.name in record.objectives]
    return record.reason == "limit" and any(measured.is_noisy and axis.limit is not None for axis, measured in found)


def _drawn(records: Sequence[TrialRecord], numbers: Mapping[int, int], probability: pareto.Floats | None) -> list[int]:
    """Indices of the points whose ties matter: the front, the baselines, and what noise may lift onto the front."""
    return [
        i
        for i, record in enumerate(records)
        if i in numbers or record.name is not None or (probability is not None and probability[i] >= NEAR)
    ]


def _noise(
    records: Sequence[TrialRecord], repeats: Sequence[TrialRecord], axes: Sequence[Axis]
) -> tuple[pareto.Floats, dict[str, float], dict[str, float]]:
    """Standard deviations [n, m], their medians by axis, and `between` of Front. A missing one is taken to be the axis'
    median; where the axis has none, the spread of the baseline that was trained with several seeds; 0 without that.

    Repeats in a row do not show what changes on a machine from one hour to the next. Where the values of that baseline,
    each measured anew, differ by more, every value has that share of itself as its deviation, if its own is smaller.
    """
    sigma, medians, between = np.zeros((len(records), len(axes))), {}, {}
    seeds = [*(r for r in records if repeats and r.name == repeats[0].repeat_of), *repeats]
    for k, axis in enumerate(axes):
        spreads = [r.objectives[axis.name].spread for r in records]
        known = [s for s in spreads if s is not None]
        if any(known) and (share := _share(seeds, axis)) > 0:
            measured = [r.objectives[axis.name] for r in records]
            wider = [max(each.spread or 0.0, share * abs(each.value)) for each in measured]
            if np.median(wider) > np.median(known):
                spreads, known, between[axis.name] = [*wider], wider, share
        if any(known):
            medians[axis.name] = float(np.median(known))
        elif len(seeds) > 1 and not known:
            medians[axis.name] = float(np.std([r.objectives[axis.name].value for r in seeds], ddof=1))
        sigma[:, k] = [medians.get(axis.name, 0.0) if s is None else s for s in spreads]
    return sigma, medians, between


def _share(seeds: Sequence[TrialRecord], axis: Axis) -> float:
    """The standard deviation of one baseline's values as a share of their mean; 0 where there are not two."""
    values = [r.objectives[axis.name].value for r in seeds if axis.name in r.objectives]
    return float(np.std(values, ddof=1) / abs(np.mean(values))) if len(values) > 1 and np.mean(values) else 0.0


def _reference(values: pareto.Floats) -> pareto.Floats:
    """The hypervolume's reference: a tenth of the range beyond the worst complete trial on every axis."""
    if not len(values):
        return np.zeros(values.shape[1])
    worst, reach = values.max(axis=0), values.max(axis=0) - values.min(axis=0)
    beyond: pareto.Floats = worst + 0.1 * np.where(reach > 0, reach, np.where(worst != 0, np.abs(worst), 1.0))
    return beyond


def progress(front: Front) -> list[tuple[int, float]]:
    """(trial, hypervolume of the trials up to it) at up to 100 steps, 25 where volumes are dear; final reference."""
    if not front.points:
        return []
    points = sorted(front.points, key=lambda p: p.record.trial)
    values = front.costs(points)
    worst = pareto.to_minimise([list(front.reference.values())], [axis.goal for axis in front.axes])[0]
    at_most = 100 if len(front.axes) <= 2 else 25
    ends = np.unique(np.linspace(1, len(points), min(at_most, len(points))).round().astype(int))
    steps, best, start = [], values[:0], 0
    for end in ends:
        best = np.vstack([best, values[start:end]])
        best, start = best[pareto.front(best)], end
        steps.append((points[end - 1].record.trial, pareto.hypervolume(best, worst)))
    return steps


def front_json(front: Front, trust: Mapping[str, Any]) -> dict[str, Any]:
    """front.json: the front, the baselines, and how far to trust them."""
    return {
        "study": front.study,
        "objectives": [vars(axis) for axis in front.axes],
        "points": [_point(point) for point in front.members],
        "baselines": [_point(point) for point in front.baselines],
        "hypervolume": front.hypervolume,
        "reference_point": front.reference,
        "n_trials": front.n_trials,
        "trust": dict(trust),
    }


def _point(point: Point) -> dict[str, Any]:
    r = point.record
    shown = {"trial", "arch_id", "name", "objectives", "tokens", "device", "checkpoint"}
    return {
        **json.loads(r.model_dump_json(include=shown)),
        "holes": picked(r.holes),
        "number": point.number,
        "on_front": point.on_front,
        "is_baseline": point.is_baseline,
        "probability": point.probability,
        "tied_with": list(point.tied_with),
        "sigma": {name: sigma or None for name, sigma in point.sigma.items()},
        "layout": {scale: describe(model) for scale, model in r.architecture.items()},
        **{name: r.metrics[name] for name in COSTS if np.isfinite(r.metrics.get(name, np.nan))},
    }


def front_csv(front: Front) -> str:
    """front.csv: one row per complete trial, the front's marked in `on_front`; spread and sigma as `Point` has them."""
    header = ["trial", "arch_id", "name", "on_front", "probability"]
    for axis in front.axes:
        header += [axis.name, f"{axis.name}_spread", f"{axis.name}_sigma"]
    header += [*COSTS, "tokens", "seconds", "layout_proxy", "layout_target"]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(header)
    for point in front.points:
        r = point.record
        row: list[Any] = [r.trial, r.arch_id, r.name, int(point.on_front), point.probability]
        for axis in front.axes:
            row += [r.objectives[axis.name].value, r.objectives[axis.name].spread, point.sigma[axis.name] or None]
        row += [*(r.metrics.get(name) for name in COSTS), r.tokens, r.seconds.get("total")]
        row += [describe(r.architecture.get(scale, {})) for scale in ("proxy", "target")]
        rows.writerow(_harmless(cell) for cell in row)
    return text.getvalue()


def _harmless(cell: object) -> object:
    """A spreadsheet runs what starts like a formula; names come from files that others wrote."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
