"""Trials on a Ray cluster: one actor per worker, replaced when it dies, added when nodes join. The only user of `ray`.

Ray places the workers and tells when they die; everything else is the driver's. Actors are never restarted by Ray
(max_restarts=0): a handle whose node is gone for good would answer "unavailable" for ever.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from archsearch.errors import RunError
from archsearch.runners import Event
from archsearch.runners.local import THREAD_VARIABLES
from archsearch.runners.ray_cluster import Cluster, Need, disconnections, ray
from archsearch.runners.ray_intake import (
    BUSY,
    IDLE,
    PREPARING,
    REFUSED,
    REHEARSAL_SECONDS,
    REHEARSING,
    STARTING,
    WAITING,
    Intake,
    Kernels,
    Worker,
)
from archsearch.runners.ray_worker import ENTRY, TrialWorker
from archsearch.runners.storage import Storage

LOOK_SECONDS = 1.0  # how often the nodes are counted
START_FAILURES = 3  # so many actors that cannot start in a row, before the first that could, end the launch
AFTER_FAILURE = 30.0  # pause in starting more actors, once some have worked
SILENT = 2.5  # so many pauses between reports without one are a silence
LOSS_SECONDS = 15.0  # Ray tells by then that a node is lost
NOBODY_SECONDS = 30.0  # without a worker, until a person is told


@contextmanager
def connected() -> Iterator[None]:
    """What Ray Client raises when its cluster is out of reach for longer than it tries again, for people."""
    try:
        yield
    except disconnections() as error:
        detail = error.details() if hasattr(error, "details") else error
        raise RunError(f"the connection to the cluster was lost ({detail}); the same command goes on") from error


class RayRunner:
    """Workers wherever the cluster has room.

    setup: see TrialWorker. need: what one worker takes. workers: how many (None: as many as fit, now and later).
    places: kinds of device, by Ray's name or that of a custom resource, of each of which there must be workers, because
    jobs name them; empty: one pool for all. devices, on_device, rehearsal: see Intake. kernels: what to tune once per
    kind.
    Raises RunError if nothing of the kind fits the cluster, or the storage cannot be used.
    """

    def __init__(
        self,
        cluster: Cluster,
        need: Need,
        setup: Mapping[str, Any],
        *,
        workers: int | None = None,
        threads: int = 1,
        trial_timeout: float | None = None,
        places: tuple[str, ...] = (),
        devices: dict[str | None, str] | None = None,
        on_device: Callable[[str | None, str], None] = lambda place, device: None,
        kernels: Kernels | None = None,
        rehearsal: Mapping[str, Any] | None = None,
    ) -> None:
        self.need, self.workers_wanted, self.trial_timeout = need, workers, trial_timeout
        self.places: tuple[str | None, ...] = places or (None,)
        self.intake = Intake(cluster, devices, on_device, kernels, self._tell, rehearsal)
        variables = {name: str(threads) for name in THREAD_VARIABLES}
        variables["ARCHSEARCH_TUNE"] = os.environ.get("ARCHSEARCH_TUNE", "cached")
        nothing = {"storage": None, "shared": None, "corpus_sha256": None}
        self.setup: dict[str, Any] = {"entry": ENTRY, "variables": variables, **nothing, **setup}
        self.storage = Storage(self.setup["storage"]) if self.setup["storage"] else None
        if self.storage is not None:
            self.storage.check()
        self.cluster = cluster
        self.cluster.ask(need, self.places)
        self.pool: list[Worker] = []
        self.queue: list[dict[str, Any]] = []
        self.over: list[int] = []  # trials whose stored checkpoint the driver no longer needs
        self.notes: list[str] = [self.cluster.welcome]
        self.told: set[str] = set()
        self.look_at = self.start_at = 0.0
        self.failures = 0
        self.alone_since: dict[str | None, float | None] = dict.fromkeys(self.places, time.monotonic())
        self.had_worker = False
        self.marks: dict[str | None, str | None] = {}  # place to the resource by which its workers were asked for

    # ---- what the driver calls ----------------------------------------------------------------------------------

    def free(self, kind: str | None = None) -> int:
        """Workers without a job, of a kind if jobs name kinds; one job may wait for the first worker to come."""
        states = [worker.state for worker in self.pool if worker.place == kind]
        n_queued = [job.get("kind") for job in self.queue].count(kind)
        if IDLE not in states and BUSY not in states and not n_queued:
            return 1
        return max(states.count(IDLE) - n_queued, 0)

    @connected()
    def submit(self, job: Mapping[str, Any]) -> None:
        """Hand a job to an idle worker, now or when there is one."""
        job = {**job, **{key: os.path.abspath(job[key]) for key in ("checkpoint", "base_dir") if job.get(key)}}
        if self.storage is not None and not self.storage.has(job["job"]):
            self._bring(job)
        self.queue.append(job)
        self._place()

    @connected()
    def wait(self, timeout: float) -> list[Event]:
        """Events of all workers; also returns (with none) as soon as a worker is free that was not."""
        for trial in self.over:  # by now the driver has recorded them
            assert self.storage is not None
            self.storage.delete(trial)
        self.over.clear()
        until = time.monotonic() + timeout
        while True:
            self._grow()
            self._place()
            before = sum(map(self.free, self.places))
            events = self._hear(self._pause(until)) + self._overdue()
            events += [Event(-1, "note", message=note) for note in self.notes]
            self.notes.clear()
            if events or sum(map(self.free, self.places)) > before or time.monotonic() >= until:
                return events

    def status(self) -> str:
        """Nodes, workers and devices in use, for people."""
        busy = sum(worker.state == BUSY for worker in self.pool)
        ready = sum(worker.state in (IDLE, BUSY) for worker in self.pool)
        gpus = f", {busy * self.need.gpus:g} of {self.cluster.n_gpus:g} GPUs" if self.cluster.n_gpus else ""
        return f"Ray: {self.cluster.n_nodes} nodes, {busy} of {ready} workers busy{gpus}"

    def finish(self) -> None:
        """The study is over: no stored checkpoint is needed any more."""
        if self.storage is not None:
            self.storage.clear()

    def close(self) -> None:
        """End all workers, and the cluster if it was started for this study."""
        for worker in self.pool:
            self._kill(worker)
        self.pool.clear()
        self.cluster.close()

    # ---- the pool -----------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """As many actors as are wanted or could fit, and one more: it starts as soon as somebody makes room."""
        now = time.monotonic()
        if now < self.look_at:
            return
        self.look_at = now + LOOK_SECONDS
        self.cluster.look()
        fits = {place: self.cluster.fits(place) for place in self.places}
        for place in self.places:
            self._tell_if_alone(now, place, fits[place])
        if not self.had_worker:
            self.intake.give_up_if_all_refuse(self.pool, now, sum(fits.values()))
        if now >= self.start_at:
            for place in self.places:
                self._start(place, fits[place])

    def _start(self, place: str | None, fits: int) -> None:
        """Actors of one place, so many as are wanted there."""
        mark = self.cluster.mark(place) if place else None
        if self.marks.setdefault(place, mark) != mark:  # the first node of that kind has come, and names it otherwise
            self.marks[place] = mark
            for worker in [w for w in self.pool if w.place == place and w.state == STARTING]:
                self._drop(worker)
        pool = [worker for worker in self.pool if worker.place == place]
        wanted = None if self.workers_wanted is None else -(-self.workers_wanted // len(self.places))
        if self.cluster.is_own:
            wanted = min(fits, wanted or fits)
        elif wanted is None:
            wanted = max(fits, sum(worker.state in (IDLE, BUSY) for worker in pool) + 1)
        for _ in range(wanted - sum(worker.state != REFUSED for worker in pool)):
            actor = self.cluster.actor(TrialWorker, place).remote(json.dumps(self.setup))
            self.pool.append(Worker(actor, place, call=actor.hello.remote()))

    def _tell_if_alone(self, now: float, place: str | None, fits: int) -> None:
        since = self.alone_since[place]
        if any(worker.place == place and worker.state in (IDLE, BUSY) for worker in self.pool):
            self.alone_since[place], self.had_worker = None, True
        elif since is None:
            self.alone_since[place] = now
        elif now - since > NOBODY_SECONDS:
            self.alone_since[place] = now
            room = f"room for {fits} in all" if fits else "no node that could hold it"
            where = f" on {place}" if place else ""
            self.notes.append(f"still no worker{where}: each asks for {self.need}, and the cluster has {room}{where}")

    def _pause(self, until: float) -> float:
        times = [until, self.look_at, *(w.deadline for w in self.pool if w.deadline is not None)]
        return max(0.0, min(times) - time.monotonic())

    def _place(self) -> None:
        """Give waiting jobs to idle workers of their kind."""
        for worker in self.pool if self.queue else ():
            job = next((job for job in self.queue if job.get("kind") == worker.place), None)
            if worker.state == IDLE and job is not None:
                self.queue.remove(job)
                worker.job, worker.state = job, BUSY
                worker.deadline = None if self.trial_timeout is None else time.monotonic() + self.trial_timeout
                worker.call = worker.actor.run.remote(json.dumps(worker.job))

    def _hear(self, pause: float) -> list[Event]:
        """Wait for the first answer of any worker, then take all that are there."""
        refs = {ref: worker for worker in self.pool for ref in (worker.call, worker.listen) if ref is not None}
        if not refs:
            time.sleep(pause)
            return []
        some, _ = ray().wait(list(refs), num_returns=1, timeout=pause)
        if not some:
            return []
        ready, _ = ray().wait(list(refs), num_returns=len(refs), timeout=0)
        events: list[Event] = []
        for ref in ready:
            worker = refs[ref]
            if worker in self.pool and ref in (worker.call, worker.listen):
                events += self._settle(worker, ref)
        return events

    def _settle(self, worker: Worker, ref: Any) -> list[Event]:
        errors = ray().exceptions
        try:
            answer = ray().get(ref)
        except errors.RayError as error:
            return self._lost(worker, error)
        data = json.loads(answer) if answer[:1] == "{" else answer
        if ref == worker.listen:
            worker.listen, worker.heard_at = self._listen(worker), time.monotonic()
            if worker.job is None or data["number"] == worker.heard or not data["progress"]:
                return []
            worker.heard = data["number"]
            if "storage" in data["progress"]:
                self._tell(f"checkpoints do not reach {self.setup['storage']}: {data['progress']['storage']}")
            return [Event(worker.job["job"], "progress", data["progress"])]
        worker.call = None
        if worker.state == STARTING:
            self._meet(worker, data)
        elif worker.state == PREPARING:
            self.intake.prepared(worker, data)
            self.intake.prepare(self.pool)
        elif worker.state == REHEARSING:
            self.intake.rehearsed(worker, data)
        else:
            assert worker.job is not None
            return self._done(worker, worker.job, data)
        return []

    def _listen(self, worker: Worker) -> Any:
        return worker.actor.listen.remote(self._listen_seconds())

    def _listen_seconds(self) -> float:
        """The driver hears at most some hundred reports a second."""
        return max(0.5, len(self.pool) / 100)

    def _meet(self, worker: Worker, facts: dict[str, Any]) -> None:
        """Take a worker in, or leave it out with the reason."""
        worker.facts = facts
        self.failures = 0
        if (why := self.intake.objection(worker)) is not None:
            self.intake.refuse(worker, why, time.monotonic())
            self.look_at = 0.0
            if self.intake.is_elsewhere(worker):  # no other will be put there
                self._drop(worker)
            return
        if self.intake.devices is not None and worker.place is None:
            self.cluster.prefer(facts["node"])
        worker.listen, worker.heard_at = self._listen(worker), time.monotonic()
        worker.state = WAITING
        self.intake.prepare(self.pool)

    # ---- a job's end --------------------------------------------------------------------------------------------

    def _done(self, worker: Worker, job: dict[str, Any], outcome: dict[str, Any]) -> list[Event]:
        worker.state, worker.job, worker.deadline, worker.heard = IDLE, None, None, -1
        if outcome["status"] == "unwritable":
            outcome["message"] = f"on {worker.facts['host']}: {outcome['message']}"
        if self.storage is not None:
            if outcome["status"] == "complete" and job["keep"]:
                self._fetch(job)
            if outcome["status"] not in ("paused", "measured", "unwritable"):
                self.over.append(job["job"])
        if "CUDA error" in (outcome["message"] or ""):  # the process's context is gone, whatever it runs next
            self._drop(worker)
        return [Event(job["job"], "done", outcome)]

    def _lost(self, worker: Worker, error: Exception) -> list[Event]:
        """A worker is dead, or out of reach, which is the same: it is killed and another takes its place."""
        job, state = worker.job, worker.state
        self._drop(worker)
        if state == STARTING and not worker.facts:
            self._failed_to_start(error)
        elif state == PREPARING:
            self.intake.lost(worker, _last_line(error))
            self.intake.prepare(self.pool)
        elif state == REHEARSING and not self.cluster.is_node_loss(error):
            self.intake.failed_to_rehearse(_last_line(error))
        if job is None:
            return []
        reason, message = self.cluster.why(error, worker.facts)
        return [Event(job["job"], "lost", reason=reason, message=message)]

    def _failed_to_start(self, error: Exception) -> None:
        if isinstance(error, ray().exceptions.ActorUnavailableError) or self.cluster.is_node_loss(error):
            return  # the node went, not the worker
        self.failures += 1
        if self.had_worker:
            self.start_at = time.monotonic() + AFTER_FAILURE
            self._tell(f"a worker could not start: {_last_line(error)}")
        elif self.failures >= START_FAILURES:
            raise RunError(
                f"workers cannot start: {_last_line(error)}; every node needs archsearch in the Python that runs Ray"
            )

    def _overdue(self) -> list[Event]:
        """Kill what takes longer than it may; whoever has fallen silent gets time, as its node may be gone."""
        events, now = [], time.monotonic()
        for worker in list(self.pool):
            if worker.state == REHEARSING and worker.deadline is not None and now >= worker.deadline:
                self._drop(worker)
                self.intake.failed_to_rehearse(f"it took longer than {REHEARSAL_SECONDS:g} s")
            if worker.job is not None and worker.deadline is not None and now >= worker.deadline:
                job, silent = worker.job, now - worker.heard_at
                if SILENT * self._listen_seconds() < silent < LOSS_SECONDS:
                    worker.deadline = now + self._listen_seconds()
                    continue
                self._drop(worker)
                message = f"took longer than {self.trial_timeout:g} s"
                events.append(Event(job["job"], "lost", reason="timeout", message=message))
        return events

    def _drop(self, worker: Worker) -> None:
        self._kill(worker)
        self.pool.remove(worker)
        self.look_at = 0.0

    def _kill(self, worker: Worker) -> None:
        with suppress(Exception):  # Ray raises many kinds when it, or the actor, is gone already, which is the aim
            ray().kill(worker.actor, no_restart=True)

    # ---- checkpoints and notes ----------------------------------------------------------------------------------

    def _bring(self, job: Mapping[str, Any]) -> None:
        """A checkpoint that the run folder has (of another runner) goes to the storage."""
        assert self.storage is not None
        if job["checkpoint"] and Path(job["checkpoint"]).exists():
            self.storage.push(job["job"], Path(job["checkpoint"]))

    def _fetch(self, job: Mapping[str, Any]) -> None:
        """The last checkpoint of a finished trial goes to the run folder, where export finds it."""
        assert self.storage is not None
        if job["checkpoint"]:
            self.storage.pull(job["job"], Path(job["checkpoint"]))

    def _tell(self, note: str) -> None:
        """Once."""
        if note not in self.told:
            self.told.add(note)
            self.notes.append(note)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
