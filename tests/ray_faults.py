"""A trial that takes about a second and fails as its job's number says; workers of tests/test_ray.py load it by name.

It trains in steps, each worth a checkpoint, and notes every step that it finished in a file beside the run folder.
"""

import ctypes
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

STEPS = 10
STEP_SECONDS = 0.12
SEGFAULT, HANG, NAN = 3, 6, 9


def run(job: Mapping[str, Any], report: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    checkpoint, number = Path(job["checkpoint"]), job["job"]
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    note(job, "start", step)
    while step < STEPS:
        if number == HANG and step >= 5:
            time.sleep(3600)
        time.sleep(STEP_SECONDS)
        step += 1
        beside = checkpoint.with_suffix(".part")
        beside.write_text(str(step))
        beside.replace(checkpoint)
        note(job, "step", step)
        report({"phase": "train", "tokens": step})
        if number == SEGFAULT and step == 5 and note(job, "segfault", step) == 1:
            ctypes.string_at(0)
    blocks = [block["mixer_name"] for block in job["architecture"]["proxy"]["blocks"]]
    value = float("nan") if number == NAN else 3.0 - 0.1 * blocks.count("full")
    return {
        "status": "complete",
        "reason": None,
        "message": None,
        "traceback": None,
        "objectives": {"val_bpb": {"value": value, "spread": None, "n": 1}},
        "metrics": {},
        "curve": [],
        "tokens": job["until_tokens"],
        "seconds": {"total": STEPS * STEP_SECONDS},
        "device": "cpu",
    }


def note(job: Mapping[str, Any], what: str, step: int) -> int:
    """Append a line; returns how often this job has noted `what` at this step."""
    path = Path(job["base_dir"]) / "log.jsonl"
    line = {"job": job["job"], "what": what, "step": step, "node": ray.get_runtime_context().get_node_id()}
    with path.open("a") as file:
        file.write(json.dumps({**line, "at": time.time(), "pid": os.getpid()}) + "\n")
    found = [json.loads(text) for text in path.read_text().splitlines()]
    return sum((one["job"], one["what"], one["step"]) == (job["job"], what, step) for one in found)
