"""One candidate on its way through a study, and the record it ends as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from archsearch import cost
from archsearch.architecture import dump, identity
from archsearch.space import Candidate
from archsearch.store import RunFolder, TrialRecord
from archsearch.store.record import now as now


@dataclass
class Trial:
    """One candidate on its way: what is known so far, and where it goes next."""

    trial: int
    candidate: Candidate
    number: int | None  # Optuna's; None for baselines
    rung: int = 0
    attempts: int = 0
    moves: int = 0  # attempts that ended with the node they ran on
    readings: dict[str, Any] = field(default_factory=dict)  # objectives so far, as JSON
    timed: bool = False
    kind: str | None = None  # of the device that it is on, where objectives name devices
    measured: set[str] = field(default_factory=set)  # kinds on which it was measured
    visits: int = 0  # attempts that only measured, and did
    seconds: dict[str, float] = field(default_factory=dict)
    started: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    repeat_of: str | None = None  # the baseline it trains again with another seed

    @cached_property
    def key(self) -> str:
        """Same graph and same training: the same result."""
        return f"{self.candidate.architecture.arch_id}-{identity(dump(self.candidate.train))}"


def make_record(
    trial: Trial,
    status: str,
    folder: RunFolder,
    *,
    reason: str | None = None,
    message: str | None = None,
    outcome: Mapping[str, Any] | None = None,
    copy_of: int | None = None,
    with_architecture: bool = True,
) -> TrialRecord:
    """The record of a trial that ended; `outcome` is what its worker sent, if one ran it.

    Refused and repeated candidates are recorded without their architecture, which their holes tell as well.
    """
    outcome = outcome or {}
    candidate = trial.candidate
    checkpoint = f"checkpoints/{trial.trial}.safetensors"
    return TrialRecord.model_validate(
        {
            "trial": trial.trial,
            "status": status,
            "reason": reason,
            "message": message,
            "traceback": outcome.get("traceback"),
            "name": candidate.name,
            "arch_id": candidate.architecture.arch_id,
            "architecture": candidate.architecture.to_json() if with_architecture else {},
            "holes": candidate.holes,
            "train": dump(candidate.train),
            "objectives": trial.readings,
            "metrics": {**outcome.get("metrics", {}), **_costs(candidate)} if with_architecture else {},
            "curve": outcome.get("curve", []),
            "rung": trial.rung,
            "tokens": outcome.get("tokens", 0),
            "seconds": trial.seconds,
            "device": outcome.get("device"),
            "copy_of": copy_of,
            "repeat_of": trial.repeat_of,
            "attempts": trial.attempts,
            "started": trial.started or now(),
            "finished": now(),
            "checkpoint": checkpoint if (folder.path / checkpoint).exists() else None,
        }
    )


def was_run(record: TrialRecord) -> bool:
    """Whether a worker ran it, to its end or not."""
    return record.status in ("complete", "stopped") or (
        record.status == "infeasible" and record.reason not in ("rule", "graph")
    )


def _costs(candidate: Candidate) -> dict[str, float]:
    """Costs of both scales, for tables and reports."""
    out: dict[str, float] = {}
    for scale, model in candidate.architecture.scales.items():
        out[f"params_{scale}"] = cost.params(model)
        out[f"active_params_{scale}"] = cost.active_params(model)
        out[f"state_bytes_{scale}"] = cost.state_bytes(model)
        out[f"flops_per_token_{scale}"] = cost.flops_per_token(model)
    return out
