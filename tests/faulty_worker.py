"""A worker whose jobs do what a job's `do` says; started by tests through LocalRunner(command=...)."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from archsearch.runners.worker import serve


def run(job: Mapping[str, Any], report: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    report({"phase": "train", "tokens": 1})
    if job["do"] == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job["do"] == "exit":
        os._exit(3)
    if job["do"] == "hang":
        time.sleep(3600)
    if job["do"] == "print":
        print("not part of the protocol {")
        print("nor this", file=sys.stderr)
    return {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "size": len(job.get("load", ""))}


if __name__ == "__main__":
    if "--broken" in sys.argv:
        raise SystemExit("cannot import something")
    serve(lambda: run)
