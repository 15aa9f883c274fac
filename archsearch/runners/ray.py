"""Trials on a Ray cluster: one actor per worker, replaced when it dies, added when nodes join. The only user of `ray`.

Ray places the workers and tells when they die; everything else is the driver's. Actors are never restarted by Ray
(max_restarts=0): a handle whose node is gone for good would answer "unavailable" for ever.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archsearch.errors import RunError
from archsearch.runners import Event
from archsearch.runners.local import THREAD_VARIABLES
from archsearch.runners.ray_cluster import Cluster, Need, ray
from archsearch.runners.ray_worker import ENTRY, TrialWorker, versions
from archsearch.runners.storage import Storage

LOOK_SECONDS = 1.0  # how often the nodes are counted
PATIENCE = 10.0  # so long workers may only refuse before the launch gives up
START_FAILURES = 3  # so many actors that cannot start in a row, before the first that could, end the launch
AFTER_FAILURE = 30.0  # pause in starting more actors, once some have worked
SILENT = 2.5  # so many pauses between reports without one are a silence
LOSS_SECONDS = 15.0  # Ray tells by then that a node is lost
NOBODY_SECONDS = 30.0  # without a worker, until a person is told
STARTING, WAITING, PREPARING, IDLE, BUSY, REFUSED = "starting", "waiting", "preparing", "idle", "busy", "refused"


@dataclass
class _Worker:
    """One actor. call: the answer that is awaited now; listen: the next report, and news of its death."""

    actor: Any
    state: str = STARTING
    call: Any = None
    listen: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] | None = None
    deadline: float | None = None
    heard: int = 0
    heard_at: float = 0.0


@dataclass(frozen=True)
class Kernels:
    """What to tune before a device kind's first trial. space: YAML; packs: device kind to what is known of it."""

    space: str
    budget: float
    full: bool
    packs: dict[str, str] = field(default_factory=dict)
    keep: Callable[[str, str], None] = lambda kind, pack: None  # hears of every pack that was measured


class RayRunner:
    """Workers wherever the cluster has room.

    setup: see TrialWorker. need: what one worker takes. workers: how many (None: as many as fit, now and later).
    one_kind: whether only one kind of device may work (latencies of different devices do not compare); kind: which, if
    it is known already; on_kind hears of it otherwise. kernels: what to tune once per kind, if anything.
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
        one_kind: bool = False,
        kind: str | None = None,
        on_kind: Callable[[str], None] = lambda kind: None,
        kernels: Kernels | None = None,
    ) -> None:
        self.need, self.workers_wanted, self.trial_timeout = need, workers, trial_timeout
        self.one_kind, self.kind, self.on_kind, self.kernels = one_kind, kind, on_kind, kernels
        variables = {name: str(threads) for name in THREAD_VARIABLES}
        variables["ARCHSEARCH_TUNE"] = os.environ.get("ARCHSEARCH_TUNE", "cached")
        nothing = {"storage": None, "shared": None, "corpus_sha256": None}
        self.setup: dict[str, Any] = {"entry": ENTRY, "variables": variables, **nothing, **setup}
        self.storage = Storage(self.setup["storage"]) if self.setup["storage"] else None
        if self.storage is not None:
            self.storage.check()
        self.cluster = cluster
        self.cluster.ask(need)
        self.pool: list[_Worker] = []
        self.queue: list[dict[str, Any]] = []
        self.over: list[int] = []  # trials whose stored checkpoint the driver no longer needs
        self.notes: list[str] = [self.cluster.welcome]
        self.told: set[str] = set()
        self.look_at = self.start_at = 0.0
        self.failures = 0
        self.refused_at: float | None = None
        self.refusal = ""
        self.alone_since: float | None = time.monotonic()
        self.had_worker = False

    # ---- what the driver calls ----------------------------------------------------------------------------------

    def free(self) -> int:
        """Workers without a job; one job may wait for the first worker to come."""
        idle = sum(worker.state == IDLE for worker in self.pool) - len(self.queue)
        if idle <= 0 and not self.queue and not any(worker.state == BUSY for worker in self.pool):
            return 1
        return max(idle, 0)

    def submit(self, job: Mapping[str, Any]) -> None:
        """Hand a job to an idle worker, now or when there is one."""
        job = {**job, **{key: os.path.abspath(job[key]) for key in ("checkpoint", "base_dir") if job.get(key)}}
        if self.storage is not None and not self.storage.has(job["job"]):
            self._bring(job)
        self.queue.append(job)
        self._place()

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
            before = self.free()
            events = self._hear(self._pause(until)) + self._overdue()
            events += [Event(-1, "note", message=note) for note in self.notes]
            self.notes.clear()
            if events or self.free() > before or time.monotonic() >= until:
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
        fits = self.cluster.look()
        ready = [worker for worker in self.pool if worker.state in (IDLE, BUSY)]
        self._tell_if_alone(now, bool(ready), fits)
        self._give_up_if_all_refuse(now, fits)
        if now < self.start_at:
            return
        wanted = self.workers_wanted
        if self.cluster.is_own:
            wanted = min(fits, wanted or fits)
        elif wanted is None:
            wanted = max(fits, len(ready) + 1)
        for _ in range(wanted - sum(worker.state != REFUSED for worker in self.pool)):
            self._start()

    def _start(self) -> None:
        actor = self.cluster.actor(TrialWorker).remote(json.dumps(self.setup))
        self.pool.append(_Worker(actor, call=actor.hello.remote()))

    def _tell_if_alone(self, now: float, is_served: bool, fits: int) -> None:
        if is_served:
            self.alone_since, self.had_worker = None, True
            return
        if self.alone_since is None:
            self.alone_since = now
        elif now - self.alone_since > NOBODY_SECONDS:
            self.alone_since = now
            room = f"room for {fits} in all" if fits else "no node that could hold it"
            self.notes.append(f"still no worker: each asks for {self.need}, and the cluster has {room}")

    def _pause(self, until: float) -> float:
        times = [until, self.look_at, *(w.deadline for w in self.pool if w.deadline is not None)]
        return max(0.0, min(times) - time.monotonic())

    def _place(self) -> None:
        """Give waiting jobs to idle workers."""
        for worker in self.pool:
            if not self.queue:
                return
            if worker.state == IDLE:
                worker.job, worker.state = self.queue.pop(0), BUSY
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

    def _settle(self, worker: _Worker, ref: Any) -> list[Event]:
        errors = ray().exceptions
        try:
            answer = ray().get(ref)
        except errors.RayError as error:
            return self._lost(worker, error)
        data = json.loads(answer) if answer[:1] == "{" else answer
        if ref is worker.listen:
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
            self._prepared(worker, data)
        else:
            assert worker.job is not None
            return self._done(worker, worker.job, data)
        return []

    def _listen(self, worker: _Worker) -> Any:
        pause = self._listen_seconds()
        return worker.actor.listen.options(concurrency_group="listen").remote(pause)

    def _listen_seconds(self) -> float:
        """The driver hears at most some hundred reports a second."""
        return max(0.5, len(self.pool) / 100)

    # ---- a worker's way to its first job ------------------------------------------------------------------------

    def _meet(self, worker: _Worker, facts: dict[str, Any]) -> None:
        """Take a worker in, or leave it out with the reason."""
        worker.facts = facts
        self.failures = 0
        where = f"worker on {facts['host']}"
        differ = [
            f"{what} {theirs} there and {ours} here"
            for what, ours in versions().items()
            if (theirs := facts["versions"].get(what)) != ours
        ]
        if differ:
            return self._refuse(worker, f"{where} left out: {', '.join(differ)}; install the same on every node")
        if "problem" in facts:
            return self._refuse(worker, f"{where} left out: {facts['problem']}")
        kind = facts["device"]
        if self.one_kind and self.kind is None:
            self.kind = kind
            self.on_kind(kind)
        if self.one_kind and kind != self.kind:
            self._refuse(worker, f"{where} left out: latencies of this study are of {self.kind}, and it has {kind}")
            if self.cluster.accelerator is not None:  # no other will be put there
                self._drop(worker)
            return None
        if self.one_kind:
            self.cluster.prefer(facts["node"])
        worker.listen, worker.heard_at = self._listen(worker), time.monotonic()
        worker.state = WAITING
        self._prepare()
        return None

    def _refuse(self, worker: _Worker, why: str) -> None:
        """It keeps its place, so that no other is put there only to be refused as well."""
        worker.state = REFUSED
        self.refused_at = self.refused_at or time.monotonic()
        self.refusal = why
        self.look_at = 0.0
        self._tell(why)

    def _give_up_if_all_refuse(self, now: float, fits: int) -> None:
        if self.refused_at is None or self.had_worker:
            return
        if any(worker.state in (WAITING, PREPARING) for worker in self.pool):
            return
        n_refused = sum(worker.state == REFUSED for worker in self.pool)
        if n_refused >= fits or now - self.refused_at > PATIENCE:
            raise RunError(f"no worker can serve this study; {self.refusal}")

    def _prepare(self) -> None:
        """Kernels are tuned by the first worker of a kind; the others of that kind wait and take over its pack."""
        kernels = self.kernels
        for worker in [w for w in self.pool if w.state == WAITING]:
            if kernels is None:
                worker.state = IDLE
                continue
            kind, pack = worker.facts["device"], kernels.packs.get(worker.facts["device"])
            if kind in self.cluster.tuned:
                worker.state = PREPARING if pack else IDLE
                worker.call = worker.actor.install.remote(pack) if pack else None
            elif not any(w.state == PREPARING and w.facts["device"] == kind for w in self.pool):
                worker.state = PREPARING
                order = {"space": kernels.space, "budget": kernels.budget, "full": kernels.full, "pack": pack}
                worker.call = worker.actor.tune.remote(json.dumps(order))

    def _prepared(self, worker: _Worker, answer: Any) -> None:
        worker.state = IDLE
        kind, kernels = worker.facts["device"], self.kernels
        assert kernels is not None
        if isinstance(answer, str):  # of `install`
            if answer != "ok":
                self._tell(f"tuned kernels of {kind} could not be shared: {answer}")
            return
        self.cluster.tuned.add(kind)
        if answer["note"]:
            self._tell(f"{kind}: {answer['note']}")
        if answer["pack"]:
            kernels.packs[kind] = answer["pack"]
            kernels.keep(kind, answer["pack"])
        self._prepare()

    # ---- a job's end --------------------------------------------------------------------------------------------

    def _done(self, worker: _Worker, job: dict[str, Any], outcome: dict[str, Any]) -> list[Event]:
        worker.state, worker.job, worker.deadline, worker.heard = IDLE, None, None, -1
        if self.storage is not None:
            if outcome["status"] == "complete" and job["keep"]:
                self._fetch(job)
            if outcome["status"] != "paused":
                self.over.append(job["job"])
        if "CUDA error" in (outcome["message"] or ""):  # the process's context is gone, whatever it runs next
            self._drop(worker)
        return [Event(job["job"], "done", outcome)]

    def _lost(self, worker: _Worker, error: Exception) -> list[Event]:
        """A worker is dead, or out of reach, which is the same: it is killed and another takes its place."""
        job, state = worker.job, worker.state
        self._drop(worker)
        if state == STARTING and not worker.facts:
            self._failed_to_start(error)
        elif state == PREPARING and self.kernels is not None:
            self.cluster.tuned.add(worker.facts["device"])  # its tuning died with it; do not try again at once
            self._tell(f"kernels of {worker.facts['device']} were not tuned: {_last_line(error)}")
            self._prepare()
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
            if worker.job is not None and worker.deadline is not None and now >= worker.deadline:
                job, silent = worker.job, now - worker.heard_at
                if SILENT * self._listen_seconds() < silent < LOSS_SECONDS:
                    worker.deadline = now + self._listen_seconds()
                    continue
                self._drop(worker)
                message = f"took longer than {self.trial_timeout:g} s"
                events.append(Event(job["job"], "lost", reason="timeout", message=message))
        return events

    def _drop(self, worker: _Worker) -> None:
        self._kill(worker)
        self.pool.remove(worker)
        self.look_at = 0.0

    def _kill(self, worker: _Worker) -> None:
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
