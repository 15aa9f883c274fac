"""The process that times: jobs as JSON lines in, what it is about to run and what it found as JSON lines out.

An illegal access or a hang costs this process and the one configuration it had announced, nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from archsearch_kernels.launch import Config, Launch, recording
from archsearch_kernels.tuner import lookup, search
from archsearch_kernels.tuner.compile import Resources, request
from archsearch_kernels.tuner.identity import code_hash, compiler, device
from archsearch_kernels.tuner.search import Search
from archsearch_kernels.tuner.store import OK, Row, Table, frozen
from archsearch_kernels.tuner.workload import Job, Workload

Say = Callable[..., None]
Prepared = tuple[Job, Workload]


def main() -> None:
    """Serve jobs until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a compiler or a workload prints is no answer

    def say(kind: str, **data: Any) -> None:
        answers.write(json.dumps({"kind": kind, **data}) + "\n")

    prepared: Prepared | None = None
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        if asked.get("prepare"):
            prepared = _prepare(asked)
            continue
        job = Job(asked["maker"], asked["arguments"])
        workload = prepared[1] if prepared is not None and prepared[0] == job else None
        prepared = None
        _serve(asked, _SessionPool(say), say, workload)


def _prepare(asked: Mapping[str, Any]) -> Prepared | None:
    """The job that comes first, made and computed by its reference while others record and compile."""
    job = Job(asked["maker"], asked["arguments"])
    try:
        workload = job.make()
        for name in workload.expected():
            workload.allowed(name)
    except Exception:  # of any kind: the job meets it again and it is reported then
        return None
    return job, workload


class _SessionPool:
    """The session's CompilePool, asked through the pipes."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.waited = 0.0  # seconds

    def compile(self, requests: Sequence[dict[str, Any]]) -> list[Resources]:
        """Ends this process where the session is gone."""
        began = time.monotonic()
        self.say("compile", requests=requests)
        line = sys.stdin.readline()
        self.waited += time.monotonic() - began
        if not line:
            sys.exit("the session has ended")
        return [Resources(**data) for data in json.loads(line)]

    def hurry(self, requests: Sequence[dict[str, Any]]) -> None:
        """They will be asked for soon."""
        self.say("hurry", requests=requests)


def _serve(asked: Mapping[str, Any], pool: _SessionPool, say: Say, workload: Workload | None = None) -> None:
    """One job: {maker, arguments, limit, seconds, most, together}; workload: if it is made already.

    All of its launches are timed before the winners are checked, at another size: meanwhile that is compiled. `seconds`
    are for timing, without what is waited for; `most` for all until then. None: no limit.
    """
    most = time.monotonic() + _seconds(asked.get("most"))
    say("begin", row=None)
    table = Table.open(lookup.user_table(device()))
    workload = workload or Job(asked["maker"], asked["arguments"]).make()
    launches = _dearest_first([x for x in distinct_launches(workload) if is_open(x, table, asked["limit"])])
    small: list[Launch] = []
    if launches:
        with recording() as small:
            problem = _made_right(launches, workload, say)
        if problem:
            say("failed", reason=problem)
            say("done", left=0)
            return
    small = distinct(small)
    table = Table.open(table.path)  # with what was found wrong just now
    timed: list[_Timed] = []
    deadline = time.monotonic() + _seconds(asked["seconds"])
    waited = pool.waited
    for launch in launches:
        if time.monotonic() >= min(most, deadline + pool.waited - waited):
            break
        say("begin", row=None)
        found = Search(
            launch,
            workload,
            pool,
            limit=asked["limit"],
            known=known_rows(launch, table),
            begin=lambda row: say("begin", row=json.loads(row.to_json())),
        )
        timed.append(_Timed(found))
        timed[-1].tell(found.time(), say)
        if found.favourite is not None:
            pool.hurry(_as_checked(launch, found.favourite, small))
    right = _right_together(timed, workload, pool, say) if asked.get("together", True) else {}
    for one in timed:
        say("begin", row=None)
        rows = one.search.accept(right[id(one.search)]) if id(one.search) in right else one.search.check()
        one.tell(rows, say)
        say("tuned", kernel=one.search.launch.kernel.name, seconds=one.seconds, device_seconds=one.device_seconds)
    say("done", left=len(launches) - len(timed))


def _seconds(limit: float | None) -> float:
    return float("inf") if limit is None else limit


def _right_together(
    timed: Sequence[_Timed], workload: Workload, pool: _SessionPool, say: Say
) -> dict[int, float | None]:
    """The searches, by id, whose favourites are right when many are in use at once; with the largest error.

    What is not among them has to be checked by itself. One that crashes or hangs here is not known: "together" is said
    before, so that the session asks for the job again without this.
    """
    searches = [one.search for one in timed if one.search.favourite is not None]
    right: dict[int, float | None] = {}
    if len(searches) < 2:
        return right
    capability = search.capability()
    read = pool.compile([request(s.launch, s.favourite, capability) for s in searches if s.favourite is not None])
    sound = [s for s, resources in zip(searches, read, strict=True) if not resources.error]
    say("together", on=True)
    for members in search.rounds(sound):
        verdict, error = search.check_together(members, workload)
        if verdict == OK:
            right |= {id(s): error for s in members}
    say("together", on=False)
    return right


@dataclass
class _Timed:
    """A search and what it took so far."""

    search: Search
    seconds: float = 0.0
    device_seconds: float = 0.0

    def tell(self, rows: Iterable[Row], say: Say) -> None:
        """Send rows as they come."""
        began, device_us = time.perf_counter(), search.device_us()
        for row in rows:
            say("row", row=json.loads(row.to_json()))
        self.seconds += time.perf_counter() - began
        self.device_seconds += 1e-6 * (search.device_us() - device_us)


def _as_checked(launch: Launch, config: Config, small: Sequence[Launch]) -> list[dict[str, Any]]:
    """What the check of a configuration compiles."""
    capability = search.capability()
    same = [x for x in small if x.kernel is launch.kernel]
    asked = [request(x, config, capability, read_code=False) for x in same]
    return [*asked, request(launch, config, capability)]


def _made_right(launches: list[Launch], workload: Workload, say: Say) -> str | None:
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
    return distinct(made)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch a key."""
    return list({launch.key: launch for launch in launches}.values())


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
    """Whether there is anything to find out: no exact answer yet, or candidates that nobody has met.

    The table may know more than the lookup, which stays as it was when this process began.
    """
    candidates = launch.kernel.configs(launch.arguments)
    known = known_rows(launch, table)
    if len(candidates) == 1 or not search.open_candidates(launch, known, limit):
        return False
    if any(row.verdict == OK and row.config in map(frozen, candidates) for row in known.values()):
        return True
    answer = lookup.explain(launch.kernel, launch.key, candidates)
    # somebody else's measurement of exactly this is enough
    return answer is None or answer.source.endswith("near") or answer.source == "measured"


if __name__ == "__main__":
    main()
