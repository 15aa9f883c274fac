"""Tunes the kernels of a list of jobs: sends them to a timing process, keeps its rows, replaces it when it is lost."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from archsearch_kernels.tuner import ahead, lookup, search
from archsearch_kernels.tuner.compile import CompilePool
from archsearch_kernels.tuner.finished import Finished
from archsearch_kernels.tuner.identity import device
from archsearch_kernels.tuner.store import Row, Table
from archsearch_kernels.tuner.workload import Job

WORKER = (sys.executable, "-m", "archsearch_kernels.tuner.worker")
HANG_SECONDS = 60.0  # without a word, nor waiting for the compiler: running a candidate takes far less
LEAST_SECONDS = 5.0  # of a job
MAX_DEATHS = 8  # of one job's process
AHEAD = 0.3  # of a budget, at most, before anything is timed
MAX_COMPILERS = 32  # each takes half a gigabyte
NOW, SOON = -2, -1  # ranks of what the timing process waits for and will ask for: before all that is compiled ahead

Say = Callable[[str], None]


@dataclass
class Summary:
    """What a tuning session did.

    left: launches that the budget did not reach. device_seconds: candidates' runs. waited: seconds in which nothing
    could be timed for want of compiled code.
    """

    tuned: int = 0
    rows: int = 0
    left: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    waited: float = 0.0
    failures: list[str] = field(default_factory=list)


def tune_jobs(
    jobs: Sequence[Job],
    *,
    budget: float | None = None,
    limit: int = search.QUICK,
    say: Say = lambda text: None,
    command: Sequence[str] = WORKER,
    recorder: Sequence[str] = ahead.RECORDER,
) -> Summary:
    """Tune every launch of the jobs that no table knows, in their order, within `budget` seconds.

    Jobs that are known to be finished are not looked into again: a second process begins at once.

    limit: candidates timed per launch. say: told what goes on, a line each. command, recorder: what to start as the
    timing process, and as the one that finds out what will be compiled. Rows go to this user's table of the current
    device. Raises RuntimeError where there is no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a CUDA device: there is none here")
    began, path = time.monotonic(), lookup.user_table(device())
    finished = Finished(path, limit)
    jobs = [job for job in jobs if job not in finished]
    if not jobs:
        return Summary()
    with CompilePool(_compilers()) as pool:
        planner = ahead.Planner(jobs, pool, limit, recorder)
        session = _Session(planner, Table.open(path), say, command)
        session.end = None if budget is None else began + budget
        try:
            planner.plan_all(None if budget is None else AHEAD * budget)
            session.summary.waited = time.monotonic() - began
            session.tune_all()
        finally:
            planner.close()
            session.close()
    session.summary.seconds = time.monotonic() - began
    if not session.summary.left and not session.summary.failures:
        finished.add(jobs)
    lookup.refresh()
    return session.summary


def _compilers() -> int:
    """Processes that compile: the one that times has a core of its own."""
    return max(1, min(MAX_COMPILERS, len(os.sched_getaffinity(0)) - 1))


class _Session:
    """One timing process after another, and what came of them."""

    end: float | None = None  # on the monotonic clock

    def __init__(self, planner: ahead.Planner, table: Table, say: Say, command: Sequence[str]) -> None:
        self.planner, self.table, self.say, self.command = planner, table, say, command
        self.summary = Summary()
        self.left: dict[int, int] = {}  # launches, by job
        self.worker: _Worker | None = _Worker(command, planner.pool)
        if planner.jobs:
            self.worker.prepare(planner.jobs[0])  # it is ready when the jobs are recorded

    def tune_all(self) -> None:
        """Tune the jobs in their order, then for as long as there is time what was cut short."""
        for i in range(len(self.planner.jobs)):
            self.tune(i)
        before = None
        while any(self.left.values()) and self.left != before and self._remaining() != 0.0:
            before = dict(self.left)
            for i, n in before.items():
                if n:
                    self.tune(i, last=True)
        self.summary.left = sum(self.left.values())

    def tune(self, i: int, last: bool = False) -> None:
        """Tune one job, with as many processes as it takes. last: it may take all the time that is left."""
        job, since = self.planner.jobs[i], time.monotonic()
        if self._remaining() == 0.0:
            self.left[i] = max(1, self.left.get(i, 0))
            return
        plan = self.planner.plan(i, self._remaining())
        if plan.is_open is False:
            return
        plan.wait(self._remaining())
        self.summary.waited += time.monotonic() - since
        together = True
        for _ in range(MAX_DEATHS):
            remaining = self._remaining()
            if remaining == 0.0:
                self.left[i] = max(1, self.left.get(i, 0))
                return
            self.worker = self.worker or _Worker(self.command, self.planner.pool)
            share = remaining if last else self._share(i)
            options = {"limit": self.planner.limit, "seconds": share, "most": remaining, "together": together}
            lost = self.worker.serve(job, options, self.table, self.summary, self.say, self.end)
            if lost is None:
                self.left[i] = self.worker.left
                if self.worker.process.poll() is not None:
                    self.close()
                return
            self.close()
            if lost.together:
                together = False
                continue
            if lost.row is None:
                self.summary.failures.append(f"{job.name or job.maker}: {lost.reason}")
                return
            self.table.append([replace(lost.row, verdict=lost.verdict, note=lost.reason)])

    def _share(self, i: int) -> float | None:
        """Seconds for a job: no job may take it all, so twice an equal share of what is left. None: no limit."""
        left = self._remaining()
        return None if left is None else min(left, max(LEAST_SECONDS, 2 * left / (len(self.planner.jobs) - i)))

    def _remaining(self) -> float | None:
        """Seconds of the budget; None: no limit."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def close(self) -> None:
        """Kill the timing process."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None


@dataclass(frozen=True)
class _Lost:
    """What a timing process was at when it died (`crash`) or hung (`timeout`).

    together: it was a check of several configurations at once, so one of them is to blame, and which is not known.
    """

    row: Row | None
    verdict: str
    reason: str
    together: bool = False


class _Worker:
    """One timing process."""

    def __init__(self, command: Sequence[str], pool: CompilePool) -> None:
        self.pool = pool
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
        self.left = 0  # launches of the last job that it did not reach

    def prepare(self, job: Job) -> None:
        """Let it make this job's workload, which will be the first."""
        self._send({"prepare": True, "maker": job.maker, "arguments": dict(job.arguments)})

    def serve(
        self,
        job: Job,
        options: Mapping[str, Any],
        table: Table,
        summary: Summary,
        say: Say,
        end: float | None = None,
    ) -> _Lost | None:
        """Run one job; None when it is over, else what the process was lost at.

        end: when nothing is waited for any more that has to be compiled, on the monotonic clock.
        """
        self._send({"maker": job.maker, "arguments": dict(job.arguments), **options})
        doing: Row | None = None
        together, self.left = False, 0
        heard = time.monotonic()
        while True:
            messages, ended = self._read(timeout=1.0)
            if messages:
                heard = time.monotonic()
            rows = [Row.from_json(json.dumps(message["row"])) for message in messages if message["kind"] == "row"]
            if rows:
                table.append(rows)
                summary.rows += len(rows)
            for message in messages:
                kind = message["kind"]
                if kind == "begin":
                    doing = None if message["row"] is None else Row.from_json(json.dumps(message["row"]))
                elif kind == "together":
                    together = message["on"]
                elif kind == "excluded":  # it is in the table already
                    summary.rows += 1
                elif kind == "hurry":
                    self.pool.submit(message["requests"], SOON)
                elif kind == "compile":
                    since = time.monotonic()
                    answers = self.pool.submit(message["requests"], NOW)
                    _, missing = wait(answers, None if end is None else max(0.0, end - since))
                    heard = time.monotonic()
                    summary.waited += heard - since
                    if missing:
                        self.left = 1
                        self.process.kill()
                        self.process.wait()
                        return None
                    self._send([asdict(answer.result()) for answer in answers])
                elif kind == "failed":
                    summary.failures.append(f"{job.name or job.maker}: {message['reason']}")
                elif kind == "tuned":
                    summary.tuned += 1
                    summary.device_seconds += message["device_seconds"]
                    say(f"{job.name or job.maker}: {message['kernel']} in {message['seconds']:.1f} s")
                elif kind == "done":
                    self.left = message["left"]
                    return None
            hung = time.monotonic() - heard > HANG_SECONDS
            if ended or hung:
                self.process.kill()
                self._read(timeout=0.0)
                last = self.log.decode(errors="replace").strip().splitlines()[-1:]
                what, verdict = ("hung", "timeout") if hung else ("died", "crash")
                return _Lost(doing, verdict, f"the timing process {what}: {''.join(last)}", together)

    def _send(self, data: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(data).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it has died, as reading from it will tell

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
