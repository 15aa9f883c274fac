"""Where a study's wall time went: training and timing against everything around them.

python benchmarks/overhead.py runs/quickstart
"""

from __future__ import annotations

import sys
from datetime import datetime

from archsearch.store import RunFolder, TrialRecord

WORK = ("latency", "train", "validate")


def main() -> None:
    """Print worker seconds by phase, and the share of worker time that was neither training nor timing."""
    folder = RunFolder.open(sys.argv[1])
    records = [record for record in folder.records() if record.seconds]
    workers = folder.read_json("settings.json")["runtime"].get("workers", 1)
    phases: dict[str, float] = {}
    for record in records:
        for phase, seconds in record.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    began = min(when(record.started) for record in records)
    wall = max(when(record.finished) for record in records) - began
    print(f"{len(records)} trials, {workers} workers, {wall:.1f} s from the first start to the last end")
    for phase, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        print(f"  {phase:<10} {seconds:8.1f} s of worker time")
    work, total = sum(phases.get(phase, 0.0) for phase in WORK), phases["total"]
    inside = total - work - phases.get("wait", 0.0)
    last = [max(when(r.finished) for r in group) for group in by_worker(records, workers)]
    idle = sum(max(last) - end for end in last)
    outside = workers * wall - total - idle
    print(f"  waiting for the device to be alone: {phases.get('wait', 0.0):.1f} s; idle at the end: {idle:.1f} s")
    print(f"  around training and timing: {inside:.1f} s in workers + {outside:.1f} s between trials "
          f"= {(inside + outside) / (workers * wall):.1%} of worker time")  # fmt: skip


def by_worker(records: list[TrialRecord], workers: int) -> list[list[TrialRecord]]:
    """Trials dealt to workers in the order they started, each to the one that was free first."""
    groups: list[list[TrialRecord]] = [[] for _ in range(workers)]
    for record in sorted(records, key=lambda r: r.started):
        free = min(groups, key=lambda group: when(group[-1].finished) if group else 0.0)
        free.append(record)
    return groups


def when(stamp: str) -> float:
    """Seconds since the epoch."""
    return datetime.fromisoformat(stamp).timestamp()


if __name__ == "__main__":
    main()
