"""Compiles ahead of the timing process: on many cores the candidates of all jobs, into Triton's cache.

A few processes (`python -m archsearch_kernels.tuner.ahead`, JSON lines in and out) make the workloads, run each once to
see its launches, and compile what is open. What a candidate takes is left in a folder for the timing process; what
fails here fails again there.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archsearch_kernels.tuner.workload import Job

HELPER = (sys.executable, "-m", "archsearch_kernels.tuner.ahead")
HELPERS = 6  # each holds one workload on the device
HANG_SECONDS = 300.0  # for a job: to compile all of it takes less
FEW = 2  # jobs that the timing process compiles as fast alone


def compile_ahead(
    jobs: Sequence[Job], answers: Path, limit: int, seconds: float | None, command: Sequence[str] = HELPER
) -> None:
    """Compile the open candidates of every launch of the jobs, in their order, for at most `seconds`.

    answers: a folder for what they take (see `compile.kept`).
    """
    cores = len(os.sched_getaffinity(0))
    helpers = min(len(jobs), HELPERS, cores // 2)
    if helpers < 1 or len(jobs) <= FEW:
        return
    crew = _Crew([*command, str(max(1, cores // helpers))], jobs, {"limit": limit, "answers": str(answers)})
    threads = [threading.Thread(target=crew.feed) for _ in range(helpers)]
    for thread in threads:
        thread.start()
    timer = threading.Timer(seconds or 0.0, crew.stop)
    if seconds is not None:
        timer.start()
    for thread in threads:
        thread.join()
    timer.cancel()


class _Crew:
    """Helpers, each fed by a thread, and the jobs that wait for them."""

    def __init__(self, command: Sequence[str], jobs: Sequence[Job], common: dict[str, Any]) -> None:
        self.command, self.common = command, common
        self.waiting = iter(jobs)
        self.lock = threading.Lock()
        self.over = False
        self.running: list[subprocess.Popen[str]] = []

    def feed(self) -> None:
        """Give one helper after another the jobs that wait, until there are none or the time is over."""
        helper: subprocess.Popen[str] | None = None
        while True:
            with self.lock:
                job = None if self.over else next(self.waiting, None)
                if job is not None and helper is None:
                    helper = self._start()
                    self.running.append(helper)
            if job is None or helper is None:
                break
            if not self._ask(helper, job):  # it died: the timing process will say at what
                helper.kill()
                helper.communicate()
                helper = None
        if helper is not None:
            helper.kill()
            helper.communicate()

    def _ask(self, helper: subprocess.Popen[str], job: Job) -> bool:
        assert helper.stdin is not None
        assert helper.stdout is not None
        watch = threading.Timer(HANG_SECONDS, helper.kill)
        watch.start()
        try:
            asked = {"maker": job.maker, "arguments": dict(job.arguments), **self.common}
            helper.stdin.write(json.dumps(asked) + "\n")
            helper.stdin.flush()
            return bool(helper.stdout.readline())
        except BrokenPipeError:
            return False
        finally:
            watch.cancel()

    def stop(self) -> None:
        """The time is over."""
        with self.lock:
            self.over = True
            for helper in self.running:
                helper.kill()

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment, text=True)


def main() -> None:
    """Serve jobs until stdin closes; the argument: how many processes may compile."""
    import torch

    from archsearch_kernels.tuner.compile import CompilePool

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a compiler or a workload prints is no answer
    with CompilePool(int(sys.argv[1])) as pool:
        for line in sys.stdin:
            problem = _compile(json.loads(line), pool)
            answers.write(json.dumps({"kind": "done", "problem": problem}) + "\n")
            gc.collect()
            torch.cuda.empty_cache()


def _compile(asked: dict[str, Any], pool: Any) -> str:
    """Compile one job's open candidates that no other process has claimed; what prevented it."""
    from archsearch_kernels.tuner import lookup, worker
    from archsearch_kernels.tuner.compile import claim, keep, request
    from archsearch_kernels.tuner.identity import device
    from archsearch_kernels.tuner.search import capability, open_candidates
    from archsearch_kernels.tuner.store import Table

    table = Table.open(lookup.user_table(device()))
    answers = Path(asked["answers"])
    try:
        workload = Job(asked["maker"], asked["arguments"]).make()
        launches = [x for x in worker.distinct_launches(workload) if worker.is_open(x, table, asked["limit"])]
        wanted = [
            asking
            for launch in launches
            for config in open_candidates(launch, worker.known_rows(launch, table), asked["limit"])
            if claim(answers, asking := request(launch, config, capability()))
        ]
        for asking, answer in zip(wanted, pool.compile(wanted), strict=True):
            keep(answers, asking, answer)
        if launches:
            workload.check()  # compiles what the checks will run
    except Exception as problem:  # of any kind: the timing process meets it again and reports it
        return f"{type(problem).__name__}: {problem}"
    return ""


if __name__ == "__main__":
    main()
