"""Tunes the kernels of a list of jobs: sends them to a timing process, keeps its rows, replaces it when it is lost."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from archsearch_kernels.tuner import lookup, search
from archsearch_kernels.tuner.ahead import compile_ahead
from archsearch_kernels.tuner.identity import device
from archsearch_kernels.tuner.store import Row, Table
from archsearch_kernels.tuner.workload import Job

WORKER = (sys.executable, "-m", "archsearch_kernels.tuner.worker")
HANG_SECONDS = 60.0  # without a word: compiling a kernel's candidates takes less, running one far less
LEAST_SECONDS = 5.0  # of a job
MAX_DEATHS = 8  # of one job's process
AHEAD = 0.6  # of a budget, at most, before anything is timed

Say = Callable[[str], None]


@dataclass
class Summary:
    """What a tuning session did. `left`: launches that the budget did not reach; `device_seconds`: candidates' runs."""

    tuned: int = 0
    rows: int = 0
    left: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def tune_jobs(
    jobs: Sequence[Job],
    *,
    budget: float | None = None,
    limit: int = search.QUICK,
    say: Say = lambda text: None,
    command: Sequence[str] = WORKER,
) -> Summary:
    """Tune every launch of the jobs that no table knows, in their order, within `budget` seconds.

    limit: candidates timed per launch. say: told what goes on, a line each. command: what to start as the timing
    process. Rows go to this user's table of the current device. Raises RuntimeError where there is no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a CUDA device: there is none here")
    table = Table.open(lookup.user_table(device()))
    summary, began = Summary(), time.monotonic()
    with tempfile.TemporaryDirectory() as answers:
        compile_ahead(jobs, Path(answers), limit, None if budget is None else AHEAD * budget)
        common = {"limit": limit, "answers": answers}
        worker: _Worker | None = None
        try:
            for i, job in enumerate(jobs):
                for _ in range(MAX_DEATHS):
                    left = None if budget is None else budget - (time.monotonic() - began)
                    if left is not None and left <= 0:
                        summary.left += 1
                        break
                    worker = worker or _Worker(command)
                    # no job may take it all: twice an equal share of what is left
                    share = None if left is None else min(left, max(LEAST_SECONDS, 2 * left / (len(jobs) - i)))
                    lost = worker.serve(job, {**common, "seconds": share}, table, summary, say)
                    if lost is None:
                        break
                    worker.close()
                    worker = None
                    if lost.row is None:
                        summary.failures.append(f"{job.name or job.maker}: {lost.reason}")
                        break
                    table.append([replace(lost.row, verdict=lost.verdict, note=lost.reason)])
        finally:
            if worker is not None:
                worker.close()
    summary.seconds = time.monotonic() - began
    lookup.refresh()
    return summary


@dataclass(frozen=True)
class _Lost:
    """What a timing process was at when it died (`crash`) or hung (`timeout`)."""

    row: Row | None
    verdict: str
    reason: str


class _Worker:
    """One timing process."""

    def __init__(self, command: Sequence[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        os.set_blocking(self.process.stderr.fileno(), False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ, "answers")
        self.selector.register(self.process.stderr, selectors.EVENT_READ, "log")
        self.log = b""
        self.pending = b""

    def serve(self, job: Job, options: Mapping[str, Any], table: Table, summary: Summary, say: Say) -> _Lost | None:
        """Run one job; None when it is over, else what the process was lost at."""
        asked = {"maker": job.maker, "arguments": dict(job.arguments), **options}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()
        doing: Row | None = None
        heard = time.monotonic()
        while True:
            messages, ended = self._read(timeout=1.0)
            if messages:
                heard = time.monotonic()
            for message in messages:
                kind = message["kind"]
                if kind == "begin":
                    doing = None if message["row"] is None else Row.from_json(json.dumps(message["row"]))
                elif kind == "row":
                    table.append([Row.from_json(json.dumps(message["row"]))])
                    summary.rows += 1
                elif kind == "excluded":  # it is in the table already
                    summary.rows += 1
                elif kind == "failed":
                    summary.failures.append(f"{job.name or job.maker}: {message['reason']}")
                elif kind == "tuned":
                    summary.tuned += 1
                    summary.device_seconds += message["device_seconds"]
                    say(f"{job.name or job.maker}: {message['kernel']} in {message['seconds']:.1f} s")
                elif kind == "done":
                    summary.left += message["left"]
                    return None
            hung = time.monotonic() - heard > HANG_SECONDS
            if ended or hung:
                self.process.kill()
                self._read(timeout=0.0)
                last = self.log.decode(errors="replace").strip().splitlines()[-1:]
                what, verdict = ("hung", "timeout") if hung else ("died", "crash")
                return _Lost(doing, verdict, f"the timing process {what}: {''.join(last)}")

    def _read(self, timeout: float) -> tuple[list[dict[str, Any]], bool]:
        ended = False
        for key, _ in self.selector.select(timeout):
            data = os.read(key.fd, 1 << 20)
            if key.data == "log":
                self.log = (self.log + data)[-20000:]
                if not data:
                    self.selector.unregister(key.fileobj)
            elif data:
                self.pending += data
            else:
                ended = True
        *lines, self.pending = self.pending.split(b"\n")
        return [json.loads(line) for line in lines], ended

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
