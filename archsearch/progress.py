"""What a launch shows while it runs: a live panel on a terminal, plain lines elsewhere, JSON lines with --json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from archsearch.notation import quantity, run_length
from archsearch.objectives import objective
from archsearch.pareto import front, to_minimise
from archsearch.store import TrialRecord
from archsearch.study import Listener, Study
from archsearch.study.candidates import Trial

N_FRONT = 8


@contextmanager
def shown(as_json: bool) -> Iterator[Listener]:
    """The display that fits where the output goes."""
    if as_json:
        yield JsonProgress()
    elif sys.stdout.isatty():
        with LiveProgress() as live:
            yield live
    else:
        yield PlainProgress()


class PlainProgress(Listener):
    """One line per event that matters."""

    def __init__(self, out: IO[str] | None = None) -> None:
        self.out = out or sys.stdout

    def started(self, study: Study) -> None:
        resumed = f", {_several(len(study.records), 'record')} so far" if study.records else ""
        self._say(f"{study.folder.path}: {_planned(study)}{resumed}")

    def recorded(self, study: Study, record: TrialRecord) -> None:
        if record.status == "duplicate" or record.reason in ("rule", "graph"):
            return
        who = record.name or layout_of(record)
        if record.status == "complete":
            values = "  ".join(f"{axis} {value}" for axis, value in shown_values(study, record).items())
        else:
            values = f"{record.reason}: {record.message}" if record.reason else f"{record.message or record.status}"
        done, total = counted(study)
        self._say(f"[{done:>3}/{total}] trial {record.trial:>3}  {values}  {who}  (eta {clock(eta(study))})")

    def note(self, message: str) -> None:
        self._say(f"note: {message}")

    def _say(self, line: str) -> None:
        print(line, file=self.out, flush=True)


class JsonProgress(Listener):
    """Every record as a JSON line, for scripts."""

    def recorded(self, study: Study, record: TrialRecord) -> None:
        done, total = counted(study)
        line = {
            "event": "trial",
            "done": done,
            "total": total,
            **json.loads(record.model_dump_json(exclude={"architecture"})),
        }
        print(json.dumps(line), flush=True)

    def note(self, message: str) -> None:
        print(json.dumps({"event": "note", "message": message}), flush=True)


class LiveProgress(Listener):
    """A panel with what runs, the current front and the time left. Use as a context manager."""

    def __init__(self) -> None:
        self.console = Console()
        self.live = Live(Text("starting workers ..."), console=self.console, refresh_per_second=4, transient=True)
        self.drawn = 0.0

    def __enter__(self) -> LiveProgress:
        self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.stop()

    def started(self, study: Study) -> None:
        self._draw(study, now=True)

    def running(self, study: Study, trial: Trial, progress: Mapping[str, Any]) -> None:
        self._draw(study)

    def recorded(self, study: Study, record: TrialRecord) -> None:
        if record.status == "infeasible" and record.reason not in ("rule", "graph"):
            self.console.print(f"trial {record.trial}: {record.reason}: {record.message}", markup=False, style="yellow")
        self._draw(study, now=record.status == "complete")

    def note(self, message: str) -> None:
        self.console.print(f"note: {message}", markup=False)

    def _draw(self, study: Study, now: bool = False) -> None:
        if not now and time.monotonic() - self.drawn < 0.25:
            return
        self.drawn = time.monotonic()
        self.live.update(Group(self._head(study), self._running(study), self._front(study)))

    def _head(self, study: Study) -> Text:
        done, total = counted(study)
        passed = clock(study.clock() - study.began)
        head = Text(
            f"{study.space.name}: {done} of {total} trials, {passed} gone, about {clock(eta(study))} left", "bold"
        )
        where = study.runner.status()
        return head.append(f"\n{where}", "dim") if where else head

    def _running(self, study: Study) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for trial in study.active.values():
            progress = trial.progress
            budget = trial.candidate.train.tokens
            share = f"{progress.get('tokens', 0) / budget:>4.0%}" if progress.get("phase") == "train" else "    "
            loss = f"loss {progress['loss']:.3f}" if "loss" in progress else ""
            model = trial.candidate.architecture.at("proxy")
            layout = trial.candidate.name or run_length([block.mixer_name for block in model.blocks])
            table.add_row(
                f"  trial {trial.trial}", str(progress.get("phase", "starting")), share, loss, Text(layout, "dim")
            )
        return table

    def _front(self, study: Study) -> Table:
        table = Table(box=None, pad_edge=False, title="front so far", title_justify="left", title_style="bold")
        for axis in study.axes:
            table.add_column(axis, justify="right")
        table.add_column("layout")
        for record in current_front(study)[:N_FRONT]:
            table.add_row(*shown_values(study, record).values(), Text(record.name or layout_of(record)))
        return table


def _planned(study: Study) -> str:
    """All that `counted` counts."""
    search = study.space.search
    parts = [_several(study.n_trials, "candidate")]
    if search.baselines:
        parts.append(_several(len(search.baselines), "baseline"))
    if search.seeds > 1:
        parts.append(f"{_several(search.seeds - 1, 'more seed')} of {search.baselines[0]}")
    return ", ".join(parts)


def _several(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def shown_values(study: Study, record: TrialRecord) -> dict[str, str]:
    """Axis to value, written as in the table of the front."""
    return {
        axis: quantity(record.objectives[axis].value, objective(goal).unit)
        for axis, goal in zip(study.axes, study.goals, strict=True)
    }


def counted(study: Study) -> tuple[int, int]:
    """Trials that ended and trials in all, refused ones and duplicates aside."""
    done = sum(
        record.status in ("complete", "stopped")
        or (record.status == "infeasible" and record.reason not in ("rule", "graph"))
        for record in study.records.values()
    )
    search = study.space.search
    return done, study.n_trials + len(search.baselines) + search.seeds - 1


def eta(study: Study) -> float:
    """Seconds left at the pace so far."""
    done, total = counted(study)
    fresh = sum(record.finished >= study.started_at for record in study.records.values() if record.status == "complete")
    return (study.clock() - study.began) / fresh * (total - done) if fresh else float("nan")


def clock(seconds: float) -> str:
    """1:05:09, 4:07, or ? when unknown."""
    if seconds != seconds:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def current_front(study: Study) -> list[TrialRecord]:
    """Complete records that nothing dominates, along the first axis."""
    complete = [r for r in study.records.values() if r.status == "complete" and r.repeat_of is None]
    if not complete:
        return []
    rows = [[record.objectives[axis].value for axis in study.axes] for record in complete]
    kept = [complete[i] for i in front(to_minimise(rows, study.directions))]
    return sorted(kept, key=lambda record: record.objectives[study.axes[0]].value)


def layout_of(record: TrialRecord) -> str:
    """The mixers of a record's proxy, folded."""
    blocks = record.architecture.get("proxy", {}).get("blocks", [])
    return run_length([block["mixer_name"] for block in blocks])
