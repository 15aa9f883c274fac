"""A Ray worker's way to its first job: its version, its kind of device, its kernels' tuning, a rehearsal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from archsearch.errors import RunError
from archsearch.runners.ray_cluster import Cluster
from archsearch.runners.ray_worker import versions

PATIENCE = 10.0  # so long workers may only refuse before the launch gives up
REHEARSAL_SECONDS = 300.0  # a rehearsal may compile every kernel
STARTING, WAITING, PREPARING, REHEARSING = "starting", "waiting", "preparing", "rehearsing"
IDLE, BUSY, REFUSED = "idle", "busy", "refused"


@dataclass
class Worker:
    """One actor. place: the kind of device that it was asked for; call: the answer that is awaited now; listen: the
    next report, and news of its death; deadline and heard_at are monotonic seconds.
    """

    actor: Any
    place: str | None = None
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
    """What to tune before a device kind's first trial.

    space: YAML. vocab_size: of its data, which a worker may not have. packs: device kind to what is known of it.
    """

    space: str
    vocab_size: int
    budget: float
    full: bool
    packs: dict[str, str] = field(default_factory=dict)
    keep: Callable[[str, str], None] = lambda kind, pack: None  # hears of every pack that was measured


class Intake:
    """Takes workers in, or leaves them out with the reason.

    devices: for every place (None: anywhere) the device on which latencies of this study are measured, as far as it is
    known; None: no latency is measured, and all kinds may work. on_device hears of a place's first device. tell: notes
    for people. rehearsal: a job that every worker runs before its first trial; what goes wrong in it costs only time.
    """

    def __init__(
        self,
        cluster: Cluster,
        devices: dict[str | None, str] | None,
        on_device: Callable[[str | None, str], None],
        kernels: Kernels | None,
        tell: Callable[[str], None],
        rehearsal: Mapping[str, Any] | None = None,
    ) -> None:
        self.cluster, self.devices, self.on_device = cluster, devices, on_device
        self.kernels, self.tell = kernels, tell
        self.rehearsal = None if rehearsal is None else json.dumps(rehearsal)
        self.refused_at: float | None = None
        self.refusal = ""

    def objection(self, worker: Worker) -> str | None:
        """Why a worker that said who it is cannot serve; None: it can, and then its device is its place's."""
        facts = worker.facts
        where = f"worker on {facts['host']} left out: "
        differ = [
            f"{what} {theirs} there and {ours} here"
            for what, ours in versions().items()
            if (theirs := facts["versions"].get(what)) != ours
        ]
        if differ:
            return f"{where}{', '.join(differ)}; install the same on every node"
        if "problem" in facts:
            return f"{where}{facts['problem']}"
        if self.devices is None:
            return None
        if worker.place not in self.devices:
            self.devices[worker.place] = facts["device"]
            self.on_device(worker.place, facts["device"])
        device = self.devices[worker.place]
        if facts["device"] != device:
            of = "of this study" if worker.place is None else f"on {worker.place}"
            return f"{where}latencies {of} are of {device}, and it has {facts['device']}"
        return None

    def is_elsewhere(self, worker: Worker) -> bool:
        """Whether a refused worker came from a kind of node that others are no longer sent to."""
        known = (self.devices or {}).get(worker.place)
        has = worker.facts.get("device", known)
        return worker.place is None and self.cluster.accelerator is not None and has != known

    def refuse(self, worker: Worker, why: str, now: float) -> None:
        """It keeps its place, so that no other is put there only to be refused as well."""
        worker.state = REFUSED
        self.refused_at = self.refused_at or now
        self.refusal = why
        self.tell(why)

    def give_up_if_all_refuse(self, pool: list[Worker], now: float, fits: int) -> None:
        """Raise RunError if there is nobody but refused workers; call while none has ever served."""
        if self.refused_at is None or any(worker.state in (WAITING, PREPARING, REHEARSING) for worker in pool):
            return
        n_refused = sum(worker.state == REFUSED for worker in pool)
        if n_refused >= fits or now - self.refused_at > PATIENCE:
            raise RunError(f"no worker can serve this study; {self.refusal}")

    def prepare(self, pool: list[Worker]) -> None:
        """Kernels are tuned by the first worker of a kind; the others of that kind wait and take over its pack."""
        kernels = self.kernels
        for worker in [w for w in pool if w.state == WAITING]:
            if kernels is None:
                self._rehearse(worker)
                continue
            kind, pack = worker.facts["device"], kernels.packs.get(worker.facts["device"])
            if kind in self.cluster.tuned and not pack:
                self._rehearse(worker)
            elif kind in self.cluster.tuned:
                worker.state = PREPARING
                worker.call = worker.actor.install.remote(pack)
            elif not any(w.state == PREPARING and w.facts["device"] == kind for w in pool):
                worker.state = PREPARING
                how = {"vocab_size": kernels.vocab_size, "budget": kernels.budget, "full": kernels.full}
                order = {"space": kernels.space, **how, "pack": pack}
                worker.call = worker.actor.tune.remote(json.dumps(order))

    def prepared(self, worker: Worker, answer: Any) -> None:
        """A worker has tuned (a mapping), or taken over what another has (a word)."""
        self._rehearse(worker)
        kind, kernels = worker.facts["device"], self.kernels
        assert kernels is not None
        if isinstance(answer, str):
            if answer != "ok":
                self.tell(f"tuned kernels of {kind} could not be shared: {answer}")
            return
        self.cluster.tuned.add(kind)
        if answer["note"]:
            self.tell(f"{kind}: {answer['note']}")
        if answer["pack"]:
            kernels.packs[kind] = answer["pack"]
            kernels.keep(kind, answer["pack"])

    def _rehearse(self, worker: Worker) -> None:
        """What a first trial would load is loaded while the other workers start, and before a trial's time counts."""
        if self.rehearsal is None:
            worker.state = IDLE
        else:
            worker.state, worker.deadline = REHEARSING, time.monotonic() + REHEARSAL_SECONDS
            worker.call = worker.actor.rehearse.remote(self.rehearsal)

    def rehearsed(self, worker: Worker, outcome: Mapping[str, Any]) -> None:
        """A worker has run the rehearsal, well or not."""
        worker.state, worker.deadline = IDLE, None
        if outcome["status"] == "infeasible":
            self.tell(f"a worker's rehearsal failed, which costs only time: {outcome['message']}")

    def failed_to_rehearse(self, why: str) -> None:
        """A worker died of the rehearsal: the others do without."""
        self.rehearsal = None
        self.tell(f"workers start without a rehearsal, as one was lost in it: {why}")

    def lost(self, worker: Worker, why: str) -> None:
        """A worker died while it tuned: its kind is not tried again at once."""
        self.cluster.tuned.add(worker.facts["device"])
        self.tell(f"kernels of {worker.facts['device']} were not tuned: {why}")
