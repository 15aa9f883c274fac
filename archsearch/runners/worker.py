"""A worker process: reads jobs as JSON lines on stdin, writes events as JSON lines on its first stdout.

Started as `python -m archsearch.runners.worker`; torch is imported once. Whatever a trial prints goes to the log. The
worker ends itself when its driver is gone, even in the middle of a trial.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

from archsearch.latency.lock import DeviceLock

Run = Callable[[Mapping[str, Any], Callable[[Mapping[str, Any]], None]], dict[str, Any]]


def main() -> None:
    """Run trials until stdin closes."""

    def load() -> Run:
        lock = DeviceLock("cpu")
        with lock.shared():  # importing torch keeps a core busy for seconds: not while another worker times a model
            from archsearch.trial import run_trial
        lock.close()
        return run_trial

    serve(load)


def serve(load: Callable[[], Run]) -> None:
    """Serve jobs with what `load` returns, until stdin closes."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of a trial belong in the log
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin, jobs), daemon=True).start()
    if limit := int(os.environ.get("ARCHSEARCH_MEMORY_LIMIT", "0")):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    run = load()
    _send(events, {"kind": "ready"})
    while True:
        job = jobs.get()

        def progress(data: Mapping[str, Any], job: dict[str, Any] = job) -> None:
            _send(events, {"job": job["job"], "kind": "progress", "data": dict(data)})

        outcome = run(job, progress)
        _send(events, {"job": job["job"], "kind": "done", "data": outcome})


def _read(stdin: IO[str], jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in stdin:
        jobs.put(json.loads(line))
    os._exit(0)  # the driver is gone: nobody wants what is still running


def _send(events: IO[str], event: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the driver is gone; `_read` ends this process
        events.write(json.dumps(event) + "\n")
        events.flush()


if __name__ == "__main__":
    main()
