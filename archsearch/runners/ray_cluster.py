"""A Ray cluster as the runner sees it: reached or started, what one worker takes of it, why a worker was lost.

A cluster of our own listens on the loopback interface only and asks for a token that nobody else knows: whoever can
talk to a Ray port can run code as its user.
"""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archsearch.errors import RunError

AUTH_MODE, AUTH_TOKEN, AUTH_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's switch between a network address (1) and 127.0.0.1 (0)
CLIENT = "ray://"
KIND, TOUCH = "accelerator_type:", 0.001  # Ray's mark of a node's kind of GPU, and how much of it a worker takes
KNOCK_SECONDS = 10.0
LEAVE_SECONDS = 10.0  # for a worker of a killed driver to end
TRIES = 4  # to connect by Ray Client: one in ten to twenty of its servers dies as it starts (ray-project/ray#63202)
NODE_LOST = ("its node has died", "owner's node died", "node is dead", "node was preempted", "drained")
OUT_OF_MEMORY = ("running low on memory", "memory pressure", "oomkilled", "out of memory (oom)")


@dataclass(frozen=True)
class Need:
    """What one worker takes: CPUs, GPUs (fractions share a card), bytes of memory, custom resources, a kind of GPU."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    accelerator: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs", *([f"{self.gpus:g} GPUs"] if self.gpus else [])]
        parts += [f"{self.memory / 2**30:.3g} GiB"] if self.memory else []
        parts += [f"{amount:g} {name}" for name, amount in self.resources.items()]
        parts += [f"a {self.accelerator}"] if self.accelerator else []
        return ", ".join(parts)

    def all(self) -> dict[str, float]:
        """As Ray names and counts them."""
        found = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory or 0), **self.resources}
        if self.accelerator:
            found[f"{KIND}{self.accelerator}"] = TOUCH
        return {name: amount for name, amount in found.items() if amount}

    def fits(self, node: Mapping[str, float]) -> int:
        """How many workers a node with these resources holds."""
        return min((math.floor(node.get(name, 0.0) / amount + 1e-6) for name, amount in self.all().items()), default=0)


def ray() -> Any:
    """The package, imported late: it reads environment variables that are set here, and takes a second."""
    import ray as package

    return package


class Cluster:
    """A connection. is_own: started for this study, ends with it. welcome: one line for people."""

    def __init__(self, is_own: bool, welcome: str) -> None:
        self.is_own, self.welcome = is_own, welcome
        self.need = Need()
        self.accelerator: str | None = None
        self.tuned: set[str] = set()  # device kinds whose kernels are tuned, or could not be
        self.nodes: list[dict[str, Any]] = []
        self.n_nodes, self.n_gpus = 0, 0.0
        self.look()

    def clear(self) -> None:
        """End the workers that a killed driver of this run has left, and wait until they are gone.

        Ray Client's server keeps them for half a minute in case that driver reconnects; beside a resumed driver they
        would train its trials a second time. Raises RunError if one of them does not end.
        """
        left = [actor for name in ray().util.list_named_actors() if (actor := _find(name)) is not None]
        deaths = [actor.leave.remote() for actor in left]
        if deaths:  # the answer is a broken connection: the process is gone, which is more than Ray's "killed" says
            ray().wait(deaths, num_returns=len(deaths), timeout=LEAVE_SECONDS)
        for actor in left:
            ray().kill(actor, no_restart=True)  # one that hangs, or has not started yet
        if deaths and (alive := ray().wait(deaths, num_returns=len(deaths), timeout=LEAVE_SECONDS)[1]):
            raise RunError(f"{len(alive)} workers of an earlier launch of this run do not end; try again in a minute")

    def ask(self, need: Need, places: tuple[str | None, ...] = (None,)) -> None:
        """What a worker takes from now on. Raises RunError if no worker would ever fit a cluster of our own."""
        self.need, self.accelerator = need, need.accelerator
        self.look()
        for place in places if self.is_own else ():
            if not self.fits(place):
                wanted = [*need.all(), *([self.mark(place)] if place else [])]
                have = {name: amount for name, amount in self.nodes[0]["Resources"].items() if name in wanted}
                on = f" on {place}" if place else ""
                raise RunError(
                    f"a worker asks for {need}{on}, and this machine has {_amounts(have)}; lower runtime's demands"
                    + (f", or launch on a cluster with {place} (--address)" if place else "")
                )

    def look(self) -> None:
        """Count the nodes. Ray may take seconds to notice a lost one."""
        self.nodes = [node for node in ray().nodes() if node["Alive"]]
        self.n_nodes = len(self.nodes)
        self.n_gpus = sum(node["Resources"].get("GPU", 0.0) for node in self.nodes)

    def fits(self, place: str | None = None) -> int:
        """How many workers the nodes hold in all, on a kind of device if one is named."""
        nodes = [node["Resources"] for node in self.nodes]
        return sum(self.need.fits(node) for node in nodes if place is None or self.mark(place) in node)

    def mark(self, place: str) -> str:
        """How Ray names a kind of device: by its own mark of GPUs, or as a custom resource where nodes have that."""
        has_own = any(place in node["Resources"] for node in self.nodes)
        has_mark = any(f"{KIND}{place}" in node["Resources"] for node in self.nodes)
        return place if not has_mark and (has_own or not self.need.gpus) else f"{KIND}{place}"

    def prefer(self, node: str) -> None:
        """From now on only GPUs of the kind that this node has, where Ray knows kinds."""
        for found in self.nodes:
            if found["NodeID"] == node and self.need.gpus:
                kinds = [name.removeprefix(KIND) for name in found["Resources"] if name.startswith(KIND)]
                self.accelerator = self.accelerator or (kinds[0] if kinds else None)

    def actor(self, worker: type, place: str | None = None) -> Any:
        """The worker class as an actor class, with what one worker takes. Importable, so Ray sends its name only.

        The actor has a name, by which the next driver of this run finds it.
        """
        options: dict[str, Any] = {"num_cpus": self.need.cpus, "num_gpus": self.need.gpus, "max_restarts": 0}
        options["name"] = secrets.token_hex(8)
        options |= {"max_concurrency": 1, "concurrency_groups": {"listen": 1}}
        options["resources"] = {**self.need.resources, **({self.mark(place): TOUCH} if place else {})}
        if self.need.memory:
            options["memory"] = self.need.memory
        if self.accelerator:
            options["accelerator_type"] = self.accelerator
        return ray().remote(**options)(worker)

    def is_node_loss(self, error: Exception) -> bool:
        """Whether a worker was lost because its machine went (failed, left or was taken back)."""
        errors = ray().exceptions
        if isinstance(error, errors.ActorUnavailableError) or getattr(error, "preempted", False):
            return True
        if isinstance(error, errors.NodeDiedError):
            return True
        return any(words in str(error).lower() for words in NODE_LOST)

    def why(self, error: Exception, facts: Mapping[str, Any]) -> tuple[str, str]:
        """The reason for a record and a sentence, for a worker that was lost with its job."""
        where = f"on {facts['host']} (process {facts['pid']})" if facts else "on an unknown node"
        if self.is_node_loss(error):
            what = "was preempted" if getattr(error, "preempted", False) else "was lost"
            return "node_lost", f"the node of the worker {where} {what}"
        text = str(error)
        if isinstance(error, ray().exceptions.OutOfMemoryError) or any(w in text.lower() for w in OUT_OF_MEMORY):
            return "out_of_memory", f"Ray ended the worker {where}: its node ran low on memory"
        if isinstance(error, ray().exceptions.RayTaskError):
            return "crash", f"the worker {where} failed outside the trial: {text.strip().splitlines()[-1]}"
        detail = text.partition("Worker exit detail:")[2].partition(". Some common causes")[0].strip()
        return "crash", f"the worker process {where} died{': ' + detail if detail else ''}"

    def close(self) -> None:
        """Leave the cluster; one of our own ends."""
        ray().shutdown()


def connect(address: str | None, run: str) -> Cluster:
    """Reach the cluster at `address` (`auto`, `host:port`, `ray://host:port`), or start one on this machine.

    run: a name of the run folder, the same at every launch. What an earlier driver of this run left there is ended.
    Raises RunError, which says what to look at, if that fails or Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise RunError("runner ray needs Ray, which is not installed: pip install 'archsearch[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": f"archsearch-{run}"}
    if address is None:
        options |= _start_here()
    else:
        _authenticate()
        _knock(address)
        options["address"] = address
    context = _join(address, options)
    dashboard = getattr(context, "dashboard_url", "")
    known = (
        f"dashboard http://{dashboard}" if dashboard else "no dashboard (pip install 'ray[default]' where it starts)"
    )
    cluster = Cluster(address is None, f"Ray cluster {address or 'on this machine'}: {known}")
    cluster.clear()
    return cluster


def disconnections() -> tuple[type[Exception], ...]:
    """What Ray raises when the way to the cluster is cut; gRPC's errors only where Ray Client has loaded gRPC."""
    grpc = sys.modules.get("grpc")
    return (ConnectionError, grpc.RpcError) if grpc is not None else (ConnectionError,)


def _join(address: str | None, options: Mapping[str, Any]) -> Any:
    for left in reversed(range(TRIES)):
        try:
            return ray().init(**options)
        except Exception as error:
            if not isinstance(error, (*disconnections(), RuntimeError, ValueError, ImportError)):
                raise
            if left and isinstance(error, ConnectionAbortedError):
                continue
            raise RunError(_unreachable(address, error)) from error
    raise AssertionError


def _find(name: str) -> Any:
    """The actor of that name in this run; None if it has ended meanwhile."""
    try:
        return ray().get_actor(name)
    except ValueError:
        return None


def _start_here() -> dict[str, Any]:
    """Options of a cluster on this machine that only this process and its children can talk to."""
    os.environ[LOOPBACK] = "0"
    if os.environ.get(AUTH_MODE) is None:  # left alone, Ray would leave a token file in the home folder
        os.environ[AUTH_MODE], os.environ[AUTH_TOKEN] = "token", secrets.token_hex(32)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "address": "local",
        "num_cpus": cores,
        "include_dashboard": importlib.util.find_spec("aiohttp_cors") is not None,
    }


def _authenticate() -> None:
    """Use the token that is there; Ray itself does so for some addresses only."""
    if os.environ.get(AUTH_MODE) is None:
        has_token = os.environ.get(AUTH_TOKEN) or os.environ.get(AUTH_FILE) or _token_file().exists()
        os.environ[AUTH_MODE] = "token" if has_token else "disabled"


def _knock(address: str) -> None:
    """Ray tries for minutes; nobody listening is known at once. Raises RunError."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise RunError(f"cannot reach a Ray cluster at {address}: {error.strerror or error}") from error


def _token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _unreachable(address: str | None, error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    if address is not None and address.startswith(CLIENT) and importlib.util.find_spec("grpc") is None:
        return f"{address} is Ray Client, which needs gRPC here and at the head: pip install 'ray[client]'"
    if address is None:
        return f"could not start Ray on this machine: {text}"
    mode = os.environ[AUTH_MODE]
    hint = (
        f"the cluster may ask for a token: put it into {AUTH_TOKEN} or {_token_file()}"
        if mode == "disabled"
        else f"{AUTH_MODE} is {mode}; the token in {AUTH_TOKEN} or {_token_file()} must be the cluster's"
    )
    return f"cannot reach a Ray cluster at {address}: {text}. Is it up (`ray status --address ...`)? If so, {hint}"


def _amounts(found: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in found.items()) or "none of it"
