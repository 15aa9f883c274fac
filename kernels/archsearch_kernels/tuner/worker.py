"""The process that times: jobs as JSON lines in, what it is about to run and what it found as JSON lines out.

An illegal access or a hang costs this process and the one configuration it had announced, nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from archsearch_kernels.launch import Launch, recording
from archsearch_kernels.tuner import lookup, search
from archsearch_kernels.tuner.compile import CompilePool
from archsearch_kernels.tuner.identity import code_hash, compiler, device
from archsearch_kernels.tuner.store import Row, Table
from archsearch_kernels.tuner.workload import Job, Workload


def main() -> None:
    """Serve jobs until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a compiler or a workload prints is no answer
    with CompilePool() as pool:
        for line in sys.stdin:
            _serve(json.loads(line), pool, answers)


def _serve(asked: Mapping[str, Any], pool: CompilePool, answers: IO[str]) -> None:
    """One job: {maker, arguments, limit, seconds, answers}."""

    def say(kind: str, **data: Any) -> None:
        answers.write(json.dumps({"kind": kind, **data}) + "\n")

    deadline = time.monotonic() + (asked["seconds"] if asked["seconds"] is not None else float("inf"))
    say("begin", row=None)
    pool.answers = Path(asked["answers"])
    table = Table.open(lookup.user_table(device()))
    workload = Job(asked["maker"], asked["arguments"]).make()
    launches = distinct_launches(workload)
    launches = _dearest_first([launch for launch in launches if is_open(launch, table, asked["limit"])])
    if launches and (problem := _made_right(launches, workload, say)):
        say("failed", reason=problem)
        say("done", left=0)
        return
    table = Table.open(table.path)  # with what was found wrong just now
    for i, launch in enumerate(launches):
        if time.monotonic() >= deadline:
            say("done", left=len(launches) - i)
            return
        began, device_us = time.perf_counter(), search.device_us()
        say("begin", row=None)
        for row in search.tune(
            launch,
            workload,
            pool,
            limit=asked["limit"],
            known=known_rows(launch, table),
            begin=lambda row: say("begin", row=json.loads(row.to_json())),
        ):
            say("row", row=json.loads(row.to_json()))
        on_device = 1e-6 * (search.device_us() - device_us)
        say("tuned", kernel=launch.kernel.name, seconds=time.perf_counter() - began, device_seconds=on_device)
    say("done", left=0)


def _made_right(launches: list[Launch], workload: Workload, say: Callable[..., None]) -> str | None:
    """Exclude configurations in use that are wrong, one kernel after another; what is still wrong then."""
    for _ in launches:
        try:
            row = search.culprit(launches, workload)
        except ValueError as problem:
            return str(problem)
        if row is None:
            return None
        Table.open(lookup.user_table(device())).append([row])  # here, since the next lookup must know it
        say("excluded", row=json.loads(row.to_json()))
        lookup.refresh()
    return None


def distinct_launches(workload: Workload) -> list[Launch]:
    """The launches of a workload, once a key, as it makes them."""
    with recording() as made:
        workload.run()
    torch.cuda.synchronize()
    return list({launch.key: launch for launch in made}.values())


def _dearest_first(launches: list[Launch]) -> list[Launch]:
    timer = search.Timer()
    used = {x.key: x.kernel.chosen(x.key) or x.kernel.configs(x.arguments)[0] for x in launches}
    cost = {x.key: timer.times(x, used[x.key], 2)[1] for x in launches}  # in what has just run
    return sorted(launches, key=lambda x: -cost[x.key])


def known_rows(launch: Launch, table: Table) -> dict[tuple[tuple[str, int], ...], Row]:
    """This user's rows of exactly this launch, by configuration."""
    key, code = launch.key, code_hash(launch.kernel.python)
    wanted = (key.kernel, code, device(), key.dtypes, key.flags, compiler(), key.bucket)
    return {row.config: row for row in table.rows.values() if (*row.group, row.compiler, row.bucket) == wanted}


def is_open(launch: Launch, table: Table, limit: int) -> bool:
    """Whether there is anything to find out: no exact answer yet, or candidates that nobody has met."""
    candidates = launch.kernel.configs(launch.arguments)
    answer = lookup.explain(launch.kernel, launch.key, candidates)
    if answer is None or answer.source.endswith("near"):
        return len(candidates) > 1
    if answer.source != "measured":  # somebody else's measurement of exactly this
        return False
    return bool(search.open_candidates(launch, known_rows(launch, table), limit))


if __name__ == "__main__":
    main()
