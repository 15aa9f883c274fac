"""What becomes of a worker that is lost, broken or late, and of the launch when the cluster is gone."""

import builtins
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from ray_pool import H100, Body, fake_runner, hosts, needs_ray, settle

from archsearch.errors import RunError


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a runner on the nodes that a test wants."""
    return partial(fake_runner, monkeypatch)


@needs_ray
def test_the_reason_of_a_loss(start: Any) -> None:
    import ray.exceptions as errors

    cluster, facts = start({"H100-a": H100}).cluster, {"host": "H100-a", "pid": 7}
    unreachable = errors.ActorUnavailableError("socket closed", b"0" * 16)
    assert cluster.why(unreachable, facts)[0] == "node_lost"
    assert cluster.why(errors.RayActorError(error_msg="gone", preempted=True), facts) == (
        "node_lost",
        "the node of the worker on H100-a (process 7) was preempted",
    )
    died = "The actor died because its node has died. Node Id: 12"
    assert cluster.why(errors.RayActorError(error_msg=died), facts)[0] == "node_lost"
    full = "Workers (tasks / actors) killed due to memory pressure (OOM), 1 on node"
    assert cluster.why(errors.RayActorError(error_msg=full), facts)[0] == "out_of_memory"
    assert cluster.why(errors.OutOfMemoryError("95% of memory"), facts)[0] == "out_of_memory"
    segfault = "Worker exit detail: Worker unexpectedly exits. Some common causes include: (1) the OOM killer"
    assert cluster.why(errors.RayActorError(error_msg=segfault), facts)[0] == "crash"


@needs_ray
def test_a_cuda_error_costs_the_process(start: Any) -> None:
    class Broken(Body):
        def run(self, job: str) -> str:
            failed = {"status": "infeasible", "reason": "exception", "message": "AcceleratorError: CUDA error: illegal"}
            return json.dumps({**failed, "objectives": {}})

    runner = start({"H100-a": H100}, body=Broken)
    settle(runner)
    (worker,) = [worker for worker in runner.pool if worker.state == "idle"]
    runner.submit({"job": 4, "checkpoint": None, "base_dir": None, "keep": False})
    (event,) = runner.wait(0.1)
    assert (event.job, event.kind) == (4, "done")
    assert worker.actor in runner.fake.killed
    settle(runner)
    assert len(hosts(runner)) == 1  # another one in its place


@needs_ray
def test_who_is_overdue_is_killed_but_a_silent_one_gets_time(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    runner = start({"H100-a": H100}, trial_timeout=60.0)
    settle(runner)
    monkeypatch.setattr("archsearch.runners.ray.time.monotonic", lambda: clock[0])
    (worker,) = [worker for worker in runner.pool if worker.state == "idle"]
    worker.job, worker.state, worker.deadline = {"job": 3}, "busy", clock[0] + 60.0
    pause = runner._listen_seconds()

    def at(seconds: float, heard: float) -> list[Any]:
        clock[0], worker.heard_at = 1000.0 + seconds, 1000.0 + heard
        return list(runner._overdue())

    assert at(59.9, heard=59.5) == []
    assert worker.deadline == 1060.0
    assert at(60.1, heard=60.1 - 3 * pause) == []  # silent: its node may be gone, which Ray tells by and by
    assert worker.deadline == pytest.approx(1060.1 + pause)
    assert at(60.1 + pause / 2, heard=60.1 - 3 * pause) == []  # not looked at again at once
    assert worker.actor not in runner.fake.killed
    (event,) = at(60.2 + pause, heard=60.0 + pause)  # it reports again, and is late
    assert (event.job, event.kind, event.reason) == (3, "lost", "timeout")
    assert event.message == "took longer than 60 s"
    assert worker.actor in runner.fake.killed
    assert worker not in runner.pool


@needs_ray
def test_silence_is_no_excuse_for_ever(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from archsearch.runners.ray import LOSS_SECONDS

    clock = [60.0]
    runner = start({"H100-a": H100}, trial_timeout=60.0)
    settle(runner)
    (worker,) = [worker for worker in runner.pool if worker.state == "idle"]
    worker.job, worker.state, worker.deadline, worker.heard_at = {"job": 3}, "busy", 60.0, 50.0
    monkeypatch.setattr("archsearch.runners.ray.time.monotonic", lambda: clock[0])
    while not (events := runner._overdue()):
        assert worker.deadline > clock[0]
        clock[0] = worker.deadline
    assert clock[0] - worker.heard_at == pytest.approx(LOSS_SECONDS, abs=2 * runner._listen_seconds())
    assert [event.reason for event in events] == ["timeout"]


@needs_ray
@pytest.mark.parametrize("kind", ["ConnectionError", "RpcError"])
def test_a_lost_connection_ends_the_launch_with_what_to_do(
    kind: str, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: Any = pytest.importorskip("grpc", reason="ray[client] is not installed") if kind == "RpcError" else builtins

    def gone(*_: Any, **__: Any) -> Any:
        raise getattr(errors, kind)("the server is gone")

    runner = start({"H100-a": H100})
    monkeypatch.setattr(runner.fake, "wait", gone)
    with pytest.raises(RunError, match=r"connection to the cluster was lost \(the server is gone\); the same command"):
        runner.wait(0.01)
