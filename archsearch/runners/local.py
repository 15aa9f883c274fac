"""Trials in worker processes of this machine: reused while they live, killed when they hang, replaced when they die."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archsearch.errors import RunError
from archsearch.notation import in_bytes
from archsearch.runners import Event

WORKER = (sys.executable, "-m", "archsearch.runners.worker")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Worker:
    """One process; `deadline` is when its job has taken too long (monotonic seconds)."""

    index: int
    process: subprocess.Popen[bytes]
    job: int | None = None
    deadline: float | None = None
    timed_out: bool = False
    ready: bool = False
    pending: bytes = field(default=b"")


class LocalRunner:
    """A fixed number of spawned workers.

    threads: CPU threads of each. devices: one CUDA index per worker (reused in turn), or none on the CPU.
    trial_timeout: seconds after which a job's process is killed. memory_limit: bytes of address space of a worker.
    command: what to start as a worker.
    """

    def __init__(
        self,
        workers: int,
        logs: Path,
        *,
        threads: int = 1,
        devices: tuple[int, ...] = (),
        trial_timeout: float | None = None,
        memory_limit: int | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.logs = logs
        self.threads = threads
        self.devices = devices
        self.trial_timeout = trial_timeout
        self.memory_limit = memory_limit
        self.command = list(command)
        self.selector = selectors.DefaultSelector()
        logs.mkdir(parents=True, exist_ok=True)
        self.workers = [self._start(i) for i in range(workers)]

    def _start(self, index: int) -> _Worker:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.update({name: str(self.threads) for name in THREAD_VARIABLES})
        if self.memory_limit is not None:
            environment["ARCHSEARCH_MEMORY_LIMIT"] = str(self.memory_limit)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = str(self.devices[index % len(self.devices)])
        with (self.logs / f"worker-{index}.log").open("ab") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is the driver's to handle
            )
        worker = _Worker(index, process)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def free(self, kind: str | None = None) -> int:
        """Workers without a job; they are all of one kind."""
        return sum(worker.job is None for worker in self.workers)

    def submit(self, job: Mapping[str, Any]) -> None:
        """Send a job to a free worker."""
        worker = next(worker for worker in self.workers if worker.job is None)
        worker.job = job["job"]
        worker.timed_out = False
        worker.deadline = None if self.trial_timeout is None else time.monotonic() + self.trial_timeout
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(job).encode() + b"\n")
            worker.process.stdin.flush()
        except BrokenPipeError:
            return  # it died while idle; `wait` sees the end of its output and reports the job as lost

    def wait(self, timeout: float) -> list[Event]:
        """Events of all workers; kills what has passed its deadline."""
        now = time.monotonic()
        deadlines = [worker.deadline for worker in self.workers if worker.deadline is not None]
        if deadlines:
            timeout = max(0.0, min(timeout, min(deadlines) - now))
        events: list[Event] = []
        for key, _ in self.selector.select(timeout):
            events += self._receive(key.data)
        now = time.monotonic()
        for worker in self.workers:
            if worker.deadline is not None and now >= worker.deadline and not worker.timed_out:
                worker.timed_out = True
                _kill(worker.process)
        return events

    def _receive(self, worker: _Worker) -> list[Event]:
        assert worker.process.stdout is not None
        try:
            data = os.read(worker.process.stdout.fileno(), 1 << 20)
        except BlockingIOError:
            return []
        if not data:
            return self._replace(worker)
        *lines, worker.pending = (worker.pending + data).split(b"\n")
        events = []
        for line in lines:
            message = json.loads(line)
            if message["kind"] == "ready":
                worker.ready = True
                continue
            if message["kind"] == "done":
                worker.job, worker.deadline = None, None
            events.append(Event(message["job"], message["kind"], message["data"]))
        return events

    def _replace(self, worker: _Worker) -> list[Event]:
        """A worker's output ended: it is dead. Report its job and start another in its place."""
        assert worker.process.stdout is not None
        self.selector.unregister(worker.process.stdout)
        code = worker.process.wait()
        _close_pipes(worker.process)
        if not worker.ready and not worker.timed_out:
            last = (self.logs / f"worker-{worker.index}.log").read_text(errors="replace").strip().splitlines()[-1:]
            room = "" if self.memory_limit is None else f" within runtime.memory_limit, {in_bytes(self.memory_limit)}"
            raise RunError(f"a worker process could not start{room} ({_ended(code)}): {''.join(last)}; see {self.logs}")
        self.workers[worker.index] = self._start(worker.index)
        if worker.job is None:
            return []
        if worker.timed_out:
            return [Event(worker.job, "lost", reason="timeout", message=f"took longer than {self.trial_timeout:g} s")]
        return [Event(worker.job, "lost", reason="crash", message=f"the worker process {_ended(code)}")]

    def status(self) -> str:
        """Nothing to say: it is this machine."""
        return ""

    def finish(self) -> None:
        """Nothing to drop: checkpoints are the run folder's."""

    def close(self) -> None:
        """Kill all workers."""
        for worker in self.workers:
            _kill(worker.process)
        for worker in self.workers:
            worker.process.wait()
            _close_pipes(worker.process)
        self.selector.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:
            continue  # unsent bytes for a dead worker


def _ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    hint = " (often the kernel's out-of-memory killer)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"
