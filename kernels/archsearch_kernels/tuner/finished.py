"""Jobs that have nothing left to tune: whoever asks again need not make their workloads to find that out.

A job is known by its maker and arguments, by the code that makes its workload (`Job.code`) and by all of this package,
with its packs: whatever changes a launch, or what is known of it, changes that. One digest a line, beside the table.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from archsearch_kernels.tuner.identity import compiler
from archsearch_kernels.tuner.workload import Job

OURS = Path(__file__).parents[1]
SOURCES = (".py", ".json")


class Finished:
    """The finished jobs of one table and one number of candidates to be timed a launch.

    path: the table; without it nothing is finished. Jobs without `code` never are.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path.with_suffix(".finished"), limit
        known = self.path.read_text(errors="replace") if path.exists() and self.path.exists() else ""
        self.digests = frozenset(known.split())

    def __contains__(self, job: Job) -> bool:
        return bool(job.code) and self._digest(job) in self.digests

    def add(self, jobs: Sequence[Job]) -> None:
        """Nothing was left of these."""
        fresh = [digest for digest in {self._digest(job) for job in jobs if job.code} if digest not in self.digests]
        if fresh:
            with self.path.open("a") as file:
                file.write("\n" + "\n".join(fresh) + "\n")  # a line feed first: somebody may have died in a line

    def _digest(self, job: Job) -> str:
        known = (source_digest(OURS), asdict(compiler()), os.environ.get("ARCHSEARCH_TUNE_DIRS", ""), self.limit)
        text = json.dumps([job.maker, dict(job.arguments), job.code, known], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@cache
def source_digest(folder: Path) -> str:
    """Of all code and data below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SOURCES):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
