"""TrialRecord: what is kept of a trial, one line of JSON each. Plain data for people, workers and other tools."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

NOISY = 0.2  # a spread beyond this share of its value tells more of the machine than of the model
REFUSALS = ("rule", "graph", "limit")  # reasons that speak of the candidate; the others, of what went wrong
Reason = Literal["rule", "limit", "graph", "out_of_memory", "non_finite", "exception", "crash", "timeout", "node_lost"]


def now() -> str:
    """The time as records write it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _encodable(value: object) -> object:
    """Text that UTF-8 can hold: undecodable file names in tracebacks carry lone surrogates, which it cannot."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_encodable)]


class _Plain(BaseModel):
    """NaN and infinity are written as strings, so that every line is JSON to every reader."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Measured(_Plain):
    """A finite value; `spread` is one standard deviation in the same unit (latency: half of p10 to p90), over `n`."""

    value: float = Field(allow_inf_nan=False)
    spread: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    n: int = 1

    @property
    def is_noisy(self) -> bool:
        """Whether the spread is more than NOISY of the value."""
        return self.spread is not None and self.spread > NOISY * abs(self.value)


class TrialRecord(_Plain):
    """One trial as it ended: one line of trials.jsonl.

    architecture: `Architecture.to_json()`, empty where a rule refused it · holes: hole path -> chosen option or number
    train: the resolved Train settings · curve: (tokens, training loss), thinned · name: the recipe's, of a baseline
    stopped: not among the best of its rung · repeat_of: the baseline that this one
    trains again with another seed · copy_of: the trial whose arch_id a duplicate repeats
    checkpoint: path inside the run folder · times are ISO 8601 in UTC, `seconds` by phase
    """

    trial: int = Field(ge=0)
    status: Literal["complete", "infeasible", "duplicate", "stopped"]
    reason: Reason | None = None
    message: Text | None = None
    traceback: Text | None = None
    name: Text | None = None
    arch_id: str
    architecture: dict[str, Any]
    holes: dict[str, Any] = {}
    train: dict[str, Any] = {}
    objectives: dict[str, Measured] = {}
    metrics: dict[str, float] = {}
    curve: tuple[tuple[int, float], ...] = ()
    rung: int = 0
    tokens: int = 0
    seconds: dict[str, float] = {}
    device: str | None = None
    copy_of: int | None = None
    repeat_of: Text | None = None
    attempts: int = 1
    started: str
    finished: str
    checkpoint: str | None = None

    @field_validator("checkpoint")
    @classmethod
    def _checkpoint_inside_the_folder(cls, value: str | None) -> str | None:
        if value is not None and (PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts):
            raise ValueError(f"found {value!r}; expected a path inside the run folder")
        return value

    @model_validator(mode="after")
    def _status_fits(self) -> Self:
        if (self.status == "infeasible") != (self.reason is not None):
            raise ValueError(f"status {self.status} with reason {self.reason}: infeasible trials have one, others none")
        if (self.status == "duplicate") != (self.copy_of is not None):
            raise ValueError(f"status {self.status} with copy_of {self.copy_of}: duplicates have one, others none")
        return self

    @property
    def ended(self) -> str:
        """The status; `infeasible` as `refused` or `failed`."""
        if self.status != "infeasible":
            return self.status
        return "refused" if self.reason in REFUSALS else "failed"

    def to_line(self) -> bytes:
        """The record as one line of JSON, newline included."""
        return self.model_dump_json().encode() + b"\n"
