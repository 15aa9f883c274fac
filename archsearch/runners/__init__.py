"""Where trials run. A runner is handed plain data (jobs) and hands plain data back (events)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Event:
    """Something a job reported. kind: `progress` (data as the trial sent it), `done` (data is the outcome),
    or `lost`: the worker died or was killed; then `reason` is crash, timeout, out_of_memory or node_lost, and `message`
    says how. `note`: a `message` for people, of no job.
    """

    job: int
    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    message: str | None = None


class Runner(Protocol):
    """Runs jobs, several at once. Jobs are numbered by their `job` key; `kind`, if they have it, names a device."""

    def free(self, kind: str | None = None) -> int:
        """How many more jobs could start now, of those that name a kind of device if one is given."""

    def submit(self, job: Mapping[str, Any]) -> None:
        """Start a job; call only while `free()`."""

    def wait(self, timeout: float) -> list[Event]:
        """Events since the last call; blocks until there is one or the timeout (seconds) has passed."""

    def status(self) -> str:
        """One line for people on what the jobs run on; empty if there is nothing to say."""

    def finish(self) -> None:
        """The study is over, and not only this process: drop what was kept to go on."""

    def close(self) -> None:
        """End all workers at once."""
