"""What runs inside a Ray actor: one worker of a study. It takes and returns JSON texts: no class of ours is pickled.

Errors that are the worker's (another version, no corpus, no storage) are answers to `hello`, and not exceptions: the
driver decides what they mean.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import archsearch
from archsearch.data import open_corpus
from archsearch.errors import UserError
from archsearch.latency.lock import DeviceLock
from archsearch.runners.storage import Storage
from archsearch.settings import Task
from archsearch.store.disk import refused
from archsearch.store.provenance import cpu_model

ENTRY = "archsearch.trial:run_trial"
Run = Callable[[Mapping[str, Any], Callable[[Mapping[str, Any]], None]], dict[str, Any]]


class TrialWorker:
    """A worker. setup: JSON with `entry` (module:function that runs a job), `device`, `task`, `base_dir`,
    `corpus_sha256`, `storage` (a URL, or null), `shared` (a file and the word that it holds, or null) and `variables`
    of the environment, which are set before torch is loaded.
    """

    def __init__(self, setup: str) -> None:
        self.setup: dict[str, Any] = json.loads(setup)
        os.environ.update(self.setup["variables"])
        self.storage = Storage(self.setup["storage"]) if self.setup["storage"] else None
        self.progress: dict[str, Any] = {}
        self.number = 0  # of the last report

    def hello(self) -> str:
        """Who this is: versions, host, device kind, and `problem` if it cannot work for this study."""
        facts: dict[str, Any] = {"versions": versions(), "host": socket.gethostname(), "pid": os.getpid()}
        try:
            facts["node"] = _node()
            self._look()
            self.run_trial = load(self.setup["entry"])
            facts["device"] = device_kind(self.setup["device"])
        except (UserError, ImportError, AttributeError, OSError, RuntimeError) as problem:
            facts["problem"] = f"{type(problem).__name__}: {problem}"
        return json.dumps(facts)

    def _look(self) -> None:
        """Everything that a trial will need is there; raises what is missing."""
        if self.storage is not None:
            self.storage.check()
        elif self.setup["shared"] is not None:
            file, word = self.setup["shared"]
            found = Path(file).read_text() if Path(file).exists() else None
            if found != word:
                raise FileNotFoundError(
                    f"{Path(file).parent} is not the same folder here as at the driver; put --run-dir on a file "
                    "system that all nodes share, or set runtime.storage to a place that they reach"
                )
        if self.setup["corpus_sha256"] is not None:
            base = self.setup["base_dir"]
            task = Task.model_validate(self.setup["task"])
            open_corpus(task, Path(base) if base else None, expect_sha256=self.setup["corpus_sha256"])

    def run(self, text: str) -> str:
        """Run a job; returns its outcome."""
        job = json.loads(text)
        self.progress = {}
        if self.storage is None:
            return json.dumps(self.run_trial(job, self._report))
        try:
            with self.storage.staged(job) as (staged, save):

                def report(data: Mapping[str, Any]) -> None:
                    problem = save()
                    self._report(data if problem is None else {**data, "storage": problem})

                outcome = self.run_trial(staged, report)
        except Exception as error:  # every file system raises errors of its own
            if (why := refused(error, self.setup["storage"])) is None:
                raise
            outcome = {"status": "unwritable", "message": why}
        return json.dumps(outcome)

    def rehearse(self, text: str) -> str:
        """Run a job whose outcome counts for nothing; returns it."""
        return json.dumps(self.run_trial(json.loads(text), lambda data: None))

    def _report(self, data: Mapping[str, Any]) -> None:
        self.progress = dict(data)
        self.number += 1

    def listen(self, seconds: float) -> str:
        """The last report, after a pause. The driver always waits for one of these, and so hears of a death at once."""
        time.sleep(seconds)
        return json.dumps({"number": self.number, "progress": self.progress})

    def leave(self) -> None:
        """End this process, whatever it is doing: its driver is gone. Whoever asked sees the connection break."""
        os._exit(0)

    def tune(self, text: str) -> str:
        """Tune the kernels of a space on this device. Takes `space` (YAML), `vocab_size`, `budget`, `full` and a `pack`
        known before.

        Returns `pack`, all that is then known of this device, and a `note`; what fails costs speed, not the study.
        """
        order = json.loads(text)
        with tempfile.TemporaryDirectory(prefix="archsearch-tune-") as folder:
            space, pack = Path(folder) / "space.yaml", Path(folder) / "pack.json"
            space.write_text(order["space"])
            command = [sys.executable, "-m", "archsearch", "tune", str(space), "--json", "--export", str(pack)]
            command += ["--vocab-size", str(order["vocab_size"]), "--budget", str(order["budget"])]
            command += ["--full"] if order["full"] else []
            environment = {**os.environ, "ARCHSEARCH_TUNE": "cached"}
            known = self.install(order["pack"]) if order["pack"] else None
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0 or not pack.exists():
                last = "".join(done.stderr.strip().splitlines()[-1:])
                return json.dumps({"pack": order["pack"], "note": f"kernels were not tuned: {last or known}"})
            found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
            note = f"kernels: {found['tuned']} launches tuned in {found['seconds']:.0f} s" if found["tuned"] else None
            return json.dumps({"pack": pack.read_text(), "note": note})

    def install(self, pack: str) -> str:
        """Add a pack that another worker has measured to the tables of this node; returns what went wrong, or `ok`."""
        from archsearch_kernels.tuner.packs import import_pack

        with tempfile.TemporaryDirectory(prefix="archsearch-tune-") as folder:
            file = Path(folder) / "pack.json"
            file.write_text(pack)
            try:
                import_pack(file)
            except ValueError as problem:
                return str(problem)
        return "ok"


# They answer while a trial runs. Ray Client takes the group from the method alone, and this file knows nothing of Ray.
for beside in (TrialWorker.listen, TrialWorker.leave):
    setattr(beside, "__ray_concurrency_group__", "listen")  # noqa: B010


def load(entry: str) -> Run:
    """The function `module:name`; importing torch keeps a core busy, so not while somebody times a model."""
    module, _, name = entry.partition(":")
    lock = DeviceLock("cpu")
    with lock.shared():
        found: Run = getattr(importlib.import_module(module), name)
    lock.close()
    return found


@cache
def versions() -> dict[str, str]:
    """What must be equal at the driver and at every worker."""
    return {
        "archsearch": archsearch.__version__,
        "its source files": sources(),
        "torch": importlib.metadata.version("torch"),
        "Python": platform.python_version(),
    }


def sources() -> str:
    """Short hash of the installed source files: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    package = Path(archsearch.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def device_kind(device: str) -> str:
    """What a latency column is about: the name of the GPU, or of the processor."""
    if not device.startswith("cuda"):
        return cpu_model()
    import torch

    return str(torch.cuda.get_device_name(device))


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""  # asking would start a cluster
