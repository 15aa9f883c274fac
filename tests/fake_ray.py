"""As much of Ray as the runner uses, inside this process: actors on made-up nodes, so that a test can have any cluster.

A call runs when it is waited for; an actor's place is the first node without one, as soon as there is such a node.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import ray.exceptions

from archsearch.runners.ray_cluster import Cluster, Need


class FakeRay:
    """The functions of the package `ray`. nodes: node id to resources; worker: makes the object behind an actor."""

    exceptions = ray.exceptions

    def __init__(self, nodes: Mapping[str, Mapping[str, float]], worker: Callable[[str, str], Any]) -> None:
        self.resources = {name: {"CPU": 1.0, **amounts} for name, amounts in nodes.items()}
        self.worker = worker
        self.killed: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.actors: list[_Actor] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": n, "Alive": True, "Resources": r} for n, r in self.resources.items()]

    def remote(self, **options: Any) -> Any:
        self.options.append(options)
        return lambda worker: SimpleNamespace(remote=lambda setup: _Actor(self, options, setup))

    def kill(self, actor: Any, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor)

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [ref for ref in refs if ref.is_ready()]
        return ready[:num_returns], [ref for ref in refs if ref not in ready[:num_returns]]

    def get(self, ref: Any) -> Any:
        return ref.result()

    def shutdown(self) -> None:
        return


class _Actor:
    def __init__(self, fake: FakeRay, options: Mapping[str, Any], setup: str) -> None:
        self.fake, self.options_, self.setup = fake, options, setup
        self.node: str | None = None
        self.body: Any = None
        fake.actors.append(self)

    def place(self) -> bool:
        """Whether it has a place; takes one if there is room."""
        if self.body is None and self not in self.fake.killed:
            taken = {actor.node for actor in self.fake.actors if actor not in self.fake.killed}
            kind = self.options_.get("accelerator_type")
            needed = {*self.options_["resources"], *([f"accelerator_type:{kind}"] if kind else [])}
            for node, resources in self.fake.resources.items():
                if node not in taken and needed <= resources.keys():
                    self.node, self.body = node, self.fake.worker(node, self.setup)
                    break
        return self.body is not None

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> _Ref:
            return _Ref(self, name, arguments)

        return SimpleNamespace(remote=call)


class _Ref:
    def __init__(self, actor: _Actor, name: str, arguments: tuple[Any, ...]) -> None:
        self.actor, self.name, self.arguments = actor, name, arguments

    def is_ready(self) -> bool:
        return self.actor.place() and self.name != "listen"

    def result(self) -> Any:
        return getattr(self.actor.body, self.name)(*self.arguments)


def fake_cluster(need: Need) -> Cluster:
    """A cluster as `connect` returns it, of whatever `ray()` is patched to be."""
    cluster = Cluster(False, "a fake cluster")
    cluster.ask(need)
    return cluster
