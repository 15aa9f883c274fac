"""What a driver costs per trial: with 256 simulated workers in this process, and through Ray with a few real ones.

python benchmarks/ray_overhead.py                 the driver alone: sampling, journal, records, front
python benchmarks/ray_overhead.py --seconds 1     256 workers whose trials take about a second: at most 256/s
python benchmarks/ray_overhead.py --ray 4         the same driver on a local Ray cluster, trials that do nothing

Simulated workers finish in turn; a trial takes no time, so all of the wall time is the driver's. The records are synced
to the disk one by one, as in a study. On a machine that others use, the time of the CPU says more than the clock.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archsearch.launch import settings_of
from archsearch.runners import Event
from archsearch.space import SearchSpace
from archsearch.store import RunFolder, TrialRecord
from archsearch.study import Listener, Study

SPACE = """
archsearch: 1
name: overhead
scales:
  proxy:  {n_blocks: BLOCKS, d_model: 128, context: 256}
  target: {n_blocks: TWICE, d_model: 512, context: 4096, vocab_size: 32000}
mixers:
  full: {kind: attention, head_dim: 32, kv_groups: {choice: [1, 2, 4]}}
  swa:  {kind: attention, head_dim: 32, window: {choice: [32, 64, 128]}}
  gdn:  {kind: gated_deltanet, head_dim: 32}
ffns:
  dense: {kind: swiglu, expand: {choice: [1, 2, 3]}}
layout: {mixer: {LAYOUT}, ffn: dense}
objectives: [{name: val_bpb}, {name: state_bytes}]
train: {tokens: 4096, batch_tokens: 256, lr: {log_range: [1e-4, 1e-2]}}
search: {trials: TRIALS, sampler: SAMPLER}
"""
MOTIF = "pattern: {choice: [[gdn, gdn, gdn, full], [swa, full], [gdn, swa], [gdn, gdn, full], [swa, swa, gdn, full]]}"
FREE = "each: [full, swa, gdn]"


def outcome(job: Mapping[str, Any]) -> dict[str, Any]:
    """A made-up result."""
    value = random.Random(job["job"]).uniform(1.0, 3.0)
    return {
        "status": "complete",
        "reason": None,
        "message": None,
        "traceback": None,
        "objectives": {"val_bpb": {"value": value, "spread": None, "n": 1}},
        "metrics": {"val_bpb": value},
        "curve": [(i * 64, 3.0 - i / 64) for i in range(64)],
        "tokens": 4096,
        "seconds": {"train": 1.0, "total": 1.0},
        "device": "cpu",
    }


def run(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
    """The trial of a real worker: `ray_overhead:run`."""
    report({"phase": "train", "tokens": 1})
    return outcome(job)


class Simulated:
    """Workers in this process. Without seconds they finish one after another, the one that started first; else each
    trial takes between half and one and a half times as long.
    """

    def __init__(self, workers: int, seconds: float = 0.0) -> None:
        self.workers, self.seconds = workers, seconds
        self.jobs: list[tuple[float, int, Mapping[str, Any]]] = []  # due, number
        self.random = random.Random(0)

    def free(self) -> int:
        return self.workers - len(self.jobs)

    def submit(self, job: Mapping[str, Any]) -> None:
        due = time.monotonic() + self.seconds * self.random.uniform(0.5, 1.5) if self.seconds else float(job["job"])
        heapq.heappush(self.jobs, (due, job["job"], job))

    def wait(self, timeout: float) -> list[Event]:
        if self.seconds:
            time.sleep(max(0.0, min(timeout, self.jobs[0][0] - time.monotonic())))
        now, events = time.monotonic(), []
        while self.jobs and (self.jobs[0][0] <= now if self.seconds else not events):
            _, number, job = heapq.heappop(self.jobs)
            events.append(Event(number, "progress", {"phase": "train", "tokens": 64}))
            events.append(Event(number, "done", outcome(job)))
        return events

    def status(self) -> str:
        return ""

    def finish(self) -> None:
        return

    def close(self) -> None:
        return


class Clock(Listener):
    """When each trial was recorded."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def recorded(self, study: Study, record: TrialRecord) -> None:
        if record.status == "complete":
            self.at.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=256, help="simulated ones")
    parser.add_argument("--seconds", type=float, default=0.0, help="of a simulated trial; 0: the driver is never idle")
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--blocks", type=int, default=12, help="at proxy scale; twice as many at target scale")
    parser.add_argument("--free", action="store_true", help="every block its own choice, not a motif")
    parser.add_argument("--ray", type=int, metavar="N", help="so many real workers on a local Ray cluster instead")
    arguments = parser.parse_args()
    text = SPACE.replace("LAYOUT", FREE if arguments.free else MOTIF).replace("TRIALS", str(arguments.trials))
    text = text.replace("BLOCKS", str(arguments.blocks)).replace("TWICE", str(2 * arguments.blocks))
    space, clock = SearchSpace.from_text(text.replace("SAMPLER", arguments.sampler)), Clock()
    runner: Any = Simulated(arguments.workers, arguments.seconds) if arguments.ray is None else on_ray(arguments.ray)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "run")
        folder.create(
            space_yaml=space.source.text, space=space.tree, settings=settings_of(space), environment={}
        )  # fmt: skip
        with folder.lock():
            began, cpu = time.perf_counter(), time.process_time()
            Study(space, folder, runner, device="cpu", corpus_sha256=None, listener=clock).run()
            cpu = time.process_time() - cpu
        runner.close()
    gaps = sorted(1e3 * (b - a) for a, b in zip(clock.at, clock.at[1:], strict=False))
    wall, steady = clock.at[-1] - began, clock.at[-1] - clock.at[0]
    p50, p90, p99 = (gaps[int(q * (len(gaps) - 1))] for q in (0.5, 0.9, 0.99))
    print(f"{len(clock.at)} trials, {space.search.sampler}: {wall:.1f} s, the first after {clock.at[0] - began:.2f} s")
    print(f"  per trial: mean {statistics.mean(gaps):.1f} ms, p50 {p50:.1f}, p90 {p90:.1f}, p99 {p99:.1f}")
    print(f"  {len(gaps) / steady:.0f} completions a second; {1e3 * cpu / len(clock.at):.1f} ms of CPU each")


def on_ray(workers: int) -> Any:
    """A local cluster with N pretended CPUs, all workers there before the clock starts."""
    import os

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    from archsearch.runners import ray_cluster
    from archsearch.runners.ray import RayRunner

    start = ray_cluster._start_here
    ray_cluster._start_here = lambda: {**start(), "num_cpus": workers}
    setup = {"entry": "ray_overhead:run", "device": "cpu"}
    runner = RayRunner(ray_cluster.connect(None, "overhead"), ray_cluster.Need(), setup)
    while sum(worker.state == "idle" for worker in runner.pool) < workers:
        runner.wait(1.0)
    return runner


if __name__ == "__main__":
    main()
