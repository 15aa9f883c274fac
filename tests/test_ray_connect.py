"""Reaching a cluster, and the workers that an earlier launch of the run has left there."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray_pool import needs_ray

from archsearch.errors import RunError
from archsearch.runners import ray_cluster
from archsearch.runners.ray_cluster import connect


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'archsearch\[ray\]'"):
        connect(None, "test")


class Left:
    """As much of Ray as meets the workers that a killed driver has left: names to whether they end when asked to."""

    def __init__(self, **workers: str) -> None:
        self.workers = workers
        self.asked: list[str] = []
        self.killed: list[str] = []
        self.util = SimpleNamespace(list_named_actors=lambda: [*workers, "ended"])

    def get_actor(self, name: str) -> Any:
        if name == "ended":
            raise ValueError("no actor of that name")
        return SimpleNamespace(name=name, leave=SimpleNamespace(remote=lambda: self.ask(name)))

    def ask(self, name: str) -> str:
        self.asked.append(name)
        return name

    def wait(self, deaths: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert num_returns == len(deaths) == len(self.asked)
        ends = {name for name, how in self.workers.items() if how == "asked" or (how == "killed" and self.killed)}
        return [name for name in deaths if name in ends], [name for name in deaths if name not in ends]

    def kill(self, actor: Any, no_restart: bool) -> None:
        self.killed.append(actor.name)

    def nodes(self) -> list[dict[str, Any]]:
        return []


def test_workers_of_a_killed_driver_are_ended_before_others_start(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Left(a="asked", b="killed")
    monkeypatch.setattr(ray_cluster, "ray", lambda: ray)
    ray_cluster.Cluster(False, "").clear()
    assert ray.asked == ray.killed == ["a", "b"]


def test_a_worker_that_does_not_end_ends_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Left(a="asked", b="never", c="never")
    monkeypatch.setattr(ray_cluster, "ray", lambda: ray)
    with pytest.raises(RunError, match="2 workers of an earlier launch of this run do not end"):
        ray_cluster.Cluster(False, "").clear()


@needs_ray
def test_a_server_of_ray_client_that_died_as_it_started_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Shaky(Left):
        def init(self, **options: Any) -> Any:
            asked.append(options)
            if len(asked) % 5 < 3:
                raise ConnectionAbortedError("Initialization failure from server: Starting Ray client server failed")
            if len(asked) > 4:
                raise ConnectionError("ray client connection timeout")
            return SimpleNamespace(dashboard_url="head:8265")

    ray = Shaky()
    monkeypatch.setattr(ray_cluster, "ray", lambda: ray)
    monkeypatch.setattr(ray_cluster, "_knock", lambda address: None)
    assert "dashboard http://head:8265" in connect("ray://head:10001", "run-12").welcome
    assert len(asked) == 3
    assert {options["namespace"] for options in asked} == {"archsearch-run-12"}
    asked += [{}, {}, {}, {}, {}]
    with pytest.raises(RunError, match="cannot reach a Ray cluster at ray://head:10001: ray client connection timeout"):
        connect("ray://head:10001", "run-12")
    assert len(asked) == 9, "what another try does not mend is told at once"


@needs_ray
def test_nobody_at_the_address_is_known_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(RunError, match=f"cannot reach a Ray cluster at {address}: Connection refused"):
            connect(address, "test")
