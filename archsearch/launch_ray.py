"""What `archsearch launch --runner ray` makes of a space: demands of a worker, what it must find, what it tunes."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import dataclass
from typing import Any

from archsearch.architecture import dump
from archsearch.errors import RunError
from archsearch.objectives import devices_of, objective
from archsearch.rehearsal import rehearsal
from archsearch.runners import Runner
from archsearch.settings import Runtime
from archsearch.space import SearchSpace
from archsearch.store import RunFolder

FILE = "cluster.json"  # what a run on a cluster must remember: its name there, the kind of device it times on


@dataclass(frozen=True)
class Wanted:
    """What the command line says; None: as the space says."""

    address: str | None = None
    workers: int | None = None
    device: str | None = None


def start_ray(space: SearchSpace, folder: RunFolder, wanted: Wanted, corpus_sha256: str | None) -> tuple[Runner, str]:
    """A runner on a Ray cluster and the device its workers use. Raises RunError where that cannot be."""
    from archsearch.runners.ray_cluster import connect

    runtime = space.runtime
    device = wanted.device or runtime.device
    if device not in (None, "cpu", "cuda"):
        raise RunError(f"device '{device}': on a cluster Ray numbers the devices; expected cpu or cuda")
    known = Memory(folder)
    cluster = connect(wanted.address or runtime.address, known.data["id"])
    try:
        device = device or ("cuda" if cluster.n_gpus or runtime.gpus_per_trial or runtime.accelerator else "cpu")
        return _start(cluster, device, space, known, wanted, corpus_sha256), "cuda:0" if device == "cuda" else device
    except BaseException:
        cluster.close()
        raise


def _start(
    cluster: Any, device: str, space: SearchSpace, known: Memory, wanted: Wanted, corpus_sha256: str | None
) -> Runner:
    from archsearch.runners.ray import RayRunner
    from archsearch.runners.ray_intake import Kernels

    runtime = space.runtime
    on = "cuda:0" if device == "cuda" else device
    setup = {
        "device": on,
        "task": dump(space.task),
        "base_dir": os.path.abspath(space.base_dir),
        "corpus_sha256": corpus_sha256,
        "storage": _storage(runtime, known),
        "shared": None if runtime.storage else known.shared(),
    }
    mode = os.environ.get("ARCHSEARCH_TUNE") or runtime.tune
    os.environ["ARCHSEARCH_TUNE"] = "off" if mode == "off" else "cached"
    kernels = None
    if device == "cuda" and mode in ("quick", "full"):
        packs = known.packs()
        how = (space.vocab_size, runtime.tune_budget, mode == "full")
        kernels = Kernels(space.source.text, *how, packs, known.keep_pack)
    need, places = need_of(runtime, device), devices_of(space.objectives)
    if places and need.accelerator:
        raise RunError("objectives name the devices they are measured on; leave runtime.accelerator out")
    is_timed = any(objective(goal).stage == "bench" for goal in space.objectives)
    return RayRunner(
        cluster,
        need,
        setup,
        workers=wanted.workers or runtime.workers,
        threads=runtime.threads or max(1, int(need.cpus)),
        trial_timeout=runtime.trial_timeout,
        places=places,
        devices=known.devices() if is_timed else None,
        on_device=known.keep_device,
        kernels=kernels,
        # on a CPU there is nothing to rehearse: importing is all, and is done by then
        rehearsal=rehearsal(space, on, corpus_sha256) if device == "cuda" else None,
    )


def need_of(runtime: Runtime, device: str) -> Any:
    """What a worker asks of the cluster."""
    from archsearch.runners.ray_cluster import Need

    gpus = runtime.gpus_per_trial
    if device == "cpu" and (gpus or runtime.accelerator):
        raise RunError("runtime.gpus_per_trial and accelerator are of no use on device cpu; leave one of them out")
    if gpus is None:
        gpus = 1.0 if device == "cuda" else 0.0
    if device == "cuda" and (gpus == 0 or (gpus > 1 and gpus != int(gpus))):
        raise RunError(f"runtime.gpus_per_trial is {gpus:g}; expected a fraction such as 1/4, or a whole number")
    cpus = float(runtime.threads or 1) if runtime.cpus_per_trial is None else runtime.cpus_per_trial
    return Need(cpus, gpus, runtime.memory_per_trial, runtime.resources, runtime.accelerator)


def _storage(runtime: Runtime, known: Memory) -> str | None:
    if runtime.storage is None:
        return None
    place = runtime.storage if "://" in runtime.storage else os.path.abspath(os.path.expanduser(runtime.storage))
    return f"{place.rstrip('/')}/{known.data['id']}"


class Memory:
    """cluster.json and the tuning packs in the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        if (folder.path / FILE).exists():
            self.data: dict[str, Any] = folder.read_json(FILE)
        else:
            self.data = {"id": f"{folder.path.name}-{secrets.token_hex(4)}", "kind": None}
            self._write()

    def _write(self) -> None:
        self.folder.write_json(FILE, self.data)

    def devices(self) -> dict[str | None, str]:
        """The device of every place (None: of all of them) on which this study has timed."""
        everywhere: dict[str | None, str] = {None: self.data["kind"]} if self.data["kind"] else {}
        return {**everywhere, **self.data.get("kinds", {})}

    def keep_device(self, place: str | None, device: str) -> None:
        """From now on this study times there on this device only."""
        if place is None:
            self.data["kind"] = device
        else:
            self.data.setdefault("kinds", {})[place] = device
        self._write()

    def shared(self) -> tuple[str, str]:
        """A file by which a worker can tell that it sees the run folder, and what the file holds."""
        self.folder.write_text("checkpoints/.shared", self.data["id"])
        return str((self.folder.path / "checkpoints" / ".shared").absolute()), self.data["id"]

    def packs(self) -> dict[str, str]:
        """Device kind to tuning pack, of earlier launches."""
        found = sorted(self.folder.path.glob("tuning-*.json"))
        return {entry["kind"]: entry["pack"] for entry in (json.loads(path.read_text()) for path in found)}

    def keep_pack(self, kind: str, pack: str) -> None:
        """Keep a pack for the next launch."""
        self.folder.write_json(f"tuning-{re.sub(r'[^A-Za-z0-9]+', '-', kind)}.json", {"kind": kind, "pack": pack})
