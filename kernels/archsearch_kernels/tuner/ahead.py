"""Compiles ahead of the timing process: finds what every job will launch, and gives it to the pool before it is needed.

A process of its own (`python -m archsearch_kernels.tuner.ahead`, JSON lines in and out) makes one workload after
another and records its launches without making them: nothing is compiled for that, and the device is idle again before
anything is timed. What fails here counts for nothing: the timing process meets it again.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from archsearch_kernels.launch import Launch, choose, recording
from archsearch_kernels.tuner import lookup, search, worker
from archsearch_kernels.tuner.compile import CompilePool, Resources, request
from archsearch_kernels.tuner.identity import device
from archsearch_kernels.tuner.store import Table
from archsearch_kernels.tuner.workload import Job

RECORDER = (sys.executable, "-m", "archsearch_kernels.tuner.ahead")
HANG_SECONDS = 60.0  # for a job: to make its workload takes less


@dataclass
class Plan:
    """What is known of a job before it is run.

    is_open: whether a launch of it is to be tuned; None: it could not be recorded. used: what it runs in as it is.
    """

    is_open: bool | None = None
    used: list[Future[Resources]] = field(default_factory=list)

    def wait(self, seconds: float | None) -> None:
        """Until the job can be run without compiling anything, at most so long."""
        wait(self.used, seconds)


class Planner:
    """Records jobs and lets the pool compile what they run in, their open candidates, then what their checks will run.

    limit: as in `search.Search`. The device is in use while a job is recorded, and idle in between.
    """

    def __init__(self, jobs: Sequence[Job], pool: CompilePool, limit: int, command: Sequence[str] = RECORDER) -> None:
        self.jobs, self.pool, self.limit, self.command = jobs, pool, limit, command
        self.plans: dict[int, Plan] = {}
        self._recorder: _Recorder | None = None

    def plan_all(self, seconds: float | None) -> None:
        """Record one job after another for so long; None: all."""
        end = None if seconds is None else time.monotonic() + seconds
        for i in range(len(self.jobs)):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return
            self.plan(i, left)

    def plan(self, i: int, seconds: float | None) -> Plan:
        """The plan of a job; it is recorded now if it was not before."""
        if i not in self.plans:
            limit = HANG_SECONDS if seconds is None else min(HANG_SECONDS, seconds)
            found = self._ask(self.jobs[i], limit)
            if found is None and limit < HANG_SECONDS:  # for want of time: there may be some later
                return Plan()
            self.plans[i] = self._submit(i, found) if found is not None and not found["problem"] else Plan()
        return self.plans[i]

    def _submit(self, i: int, found: Mapping[str, Any]) -> Plan:
        used = self.pool.submit(found["used"], rank=2 * i)
        self.pool.submit(found["candidates"], rank=2 * i + 1)
        self.pool.submit(found["checked"], rank=2 * (len(self.jobs) + i))
        return Plan(found["is_open"], used)

    def _ask(self, job: Job, seconds: float) -> dict[str, Any] | None:
        self._recorder = self._recorder or _Recorder(self.command)
        asked = {"maker": job.maker, "arguments": dict(job.arguments), "limit": self.limit}
        found = self._recorder.ask(asked, seconds)
        if found is None:  # it has died of this job, or was killed
            self.close()
        return found

    def close(self) -> None:
        """Kill the recorder."""
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None


class _Recorder:
    """The process that records."""

    def __init__(self, command: Sequence[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment, text=True)

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """What it found; None: it has died, or took longer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watch = threading.Timer(seconds, self.process.kill)
        watch.start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            return None
        finally:
            watch.cancel()
        found: dict[str, Any] | None = json.loads(line) if line else None
        return found

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.communicate()


def main() -> None:
    """Serve jobs until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a workload prints is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = {"problem": "", **record(Job(asked["maker"], asked["arguments"]), asked["limit"])}
        except Exception as problem:  # of any kind: the timing process meets it again and reports it
            found = {"problem": f"{type(problem).__name__}: {problem}"}
        answers.write(json.dumps(found) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


def record(job: Job, limit: int) -> dict[str, Any]:
    """Requests of a job: `used`, `candidates`, and `checked`: the candidates as the check launches them."""
    table = Table.open(lookup.user_table(device()))
    workload = job.make()
    with recording(dry=True) as made:
        workload.run()
    launches = worker.distinct(made)
    opened = [x for x in launches if worker.is_open(x, table, limit)]
    small: list[Launch] = []
    if opened:
        with recording(dry=True) as small:
            workload.check()
    candidates = [(x, search.open_candidates(x, worker.known_rows(x, table), limit)) for x in opened]
    checked = [(s, configs) for x, configs in candidates for s in small if s.kernel is x.kernel]

    capability = search.capability()

    def requests(asked: Iterable[tuple[Launch, Sequence[Any]]]) -> list[dict[str, Any]]:
        found = (request(x, config, capability, read_code=False) for x, configs in asked for config in configs)
        return list({json.dumps(each, sort_keys=True): each for each in found}.values())

    return {
        "is_open": bool(opened),
        "used": requests((x, [choose(x.kernel, x.key, x.arguments)]) for x in [*made, *small]),  # of a key, many codes
        "candidates": requests(candidates),
        "checked": requests(checked),
    }


if __name__ == "__main__":
    main()
