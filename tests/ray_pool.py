"""A Ray runner on made-up nodes, and workers that answer what a test wants."""

import importlib.util
import json
from typing import Any

import pytest

from archsearch.runners import ray_cluster
from archsearch.runners.ray_cluster import Need
from archsearch.runners.ray_worker import versions

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra archsearch[ray] is not installed"
)
H100, H200 = {"GPU": 1.0, "accelerator_type:H100": 1.0}, {"GPU": 1.0, "accelerator_type:H200": 1.0}
GPU = Need(cpus=1, gpus=1)


class Body:
    """A worker that answers what a test wants and notes what it was asked."""

    def __init__(self, node: str, calls: list[tuple[str, str]], **facts: Any) -> None:
        self.node, self.calls, self.facts = node, calls, facts

    def hello(self) -> str:
        kind = self.node.partition("-")[0]
        facts = {"versions": versions(), "host": self.node, "pid": 1, "node": self.node, "device": kind}
        return json.dumps({**facts, **self.facts})

    def run(self, job: str) -> str:
        self.calls.append((self.node, "run"))
        return json.dumps({"status": "complete", "message": None, "objectives": {}})

    def tune(self, order: str) -> str:
        self.calls.append((self.node, "tune"))
        return json.dumps({"pack": f"rows of {self.node}", "note": "3 launches tuned"})

    def install(self, pack: str) -> str:
        self.calls.append((self.node, f"install {pack}"))
        return "ok"


def fake_runner(
    monkeypatch: pytest.MonkeyPatch,
    nodes: dict[str, Any],
    need: Need = GPU,
    facts: Any = None,
    body: Any = Body,
    **options: Any,
) -> Any:
    """A runner on nodes of a fake Ray; its `calls` are what workers were asked, `fake` is the fake."""
    from fake_ray import FakeRay, fake_cluster

    from archsearch.runners import ray as runner_module

    calls: list[tuple[str, str]] = []
    fake = FakeRay(nodes, lambda node, setup: body(node, calls, **((facts or {}).get(node, {}))))
    monkeypatch.setattr(ray_cluster, "ray", lambda: fake)
    monkeypatch.setattr(runner_module, "ray", lambda: fake)
    runner = runner_module.RayRunner(fake_cluster(need), need, {"device": "cuda:0"}, **options)
    runner.fake, runner.calls = fake, calls
    return runner


def settle(runner: Any, rounds: int = 12) -> list[str]:
    """Let workers arrive; returns the notes."""
    notes = []
    for _ in range(rounds):
        runner.look_at = 0.0
        notes += [event.message for event in runner.wait(0.01) if event.kind == "note"]
    return notes


def hosts(runner: Any, state: str = "idle") -> set[str]:
    """Where its workers in this state are."""
    return {worker.facts["host"] for worker in runner.pool if worker.state == state}
