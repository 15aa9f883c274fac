"""The Ray runner's decisions, on made-up clusters: who may work, whose kernels are tuned, what a lost worker means."""

import builtins
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from archsearch import launch_ray
from archsearch.errors import RunError
from archsearch.runners import ray_cluster
from archsearch.runners.ray_cluster import Need, connect
from archsearch.runners.ray_worker import TrialWorker, versions
from archsearch.settings import Runtime
from archsearch.store import RunFolder

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


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a runner on nodes of a fake Ray; its `calls` are what workers were asked, `fake` is the fake."""

    def make(nodes: dict[str, Any], need: Need = GPU, facts: Any = None, body: Any = Body, **options: Any) -> Any:
        from fake_ray import FakeRay, fake_cluster

        from archsearch.runners import ray as runner_module

        calls: list[tuple[str, str]] = []
        fake = FakeRay(nodes, lambda node, setup: body(node, calls, **((facts or {}).get(node, {}))))
        monkeypatch.setattr(ray_cluster, "ray", lambda: fake)
        monkeypatch.setattr(runner_module, "ray", lambda: fake)
        runner = runner_module.RayRunner(fake_cluster(need), need, {"device": "cuda:0"}, **options)
        runner.fake, runner.calls = fake, calls
        return runner

    return make


def settle(runner: Any, rounds: int = 12) -> list[str]:
    """Let workers arrive; returns the notes."""
    notes = []
    for _ in range(rounds):
        runner.look_at = 0.0
        notes += [event.message for event in runner.wait(0.01) if event.kind == "note"]
    return notes


def hosts(runner: Any, state: str = "idle") -> set[str]:
    return {worker.facts["host"] for worker in runner.pool if worker.state == state}


@needs_ray
def test_latencies_of_two_kinds_of_gpu_never_meet(start: Any) -> None:
    kept: list[Any] = []
    nodes = {"H100-a": H100, "H200-a": H200, "H100-b": H100, "H200-b": H200}
    runner = start(nodes, devices={}, on_device=lambda *found: kept.append(found))
    notes = settle(runner)
    assert kept == [(None, "H100")]
    assert hosts(runner) == {"H100-a", "H100-b"}
    assert any("latencies of this study are of H100, and it has H200" in note for note in notes)
    assert runner.fake.options[-1]["accelerator_type"] == "H100"  # no more are asked for elsewhere
    assert runner.free() == 2


@needs_ray
def test_a_resumed_study_goes_on_with_its_kind(start: Any) -> None:
    runner = start({"H100-a": H100, "H200-a": H200}, devices={None: "H200"})
    settle(runner)
    assert hosts(runner) == {"H200-a"}


@needs_ray
def test_a_job_goes_to_the_kind_of_device_that_it_names(start: Any) -> None:
    kept: list[Any] = []
    nodes = {"H100-a": H100, "H200-a": H200, "own-a": {"GPU": 1.0, "L4": 1.0}, "other-a": {"GPU": 1.0}}
    options = {"places": ("H100", "H200", "L4"), "devices": {}, "on_device": lambda *found: kept.append(found)}
    runner = start(nodes, **options)
    settle(runner)
    assert hosts(runner) == {"H100-a", "H200-a", "own-a"}  # nobody asked for the other
    assert sorted(kept) == [("H100", "H100"), ("H200", "H200"), ("L4", "own")]
    assert [runner.free(kind) for kind in ("H100", "H200", "L4")] == [1, 1, 1]
    for job, kind in enumerate(("H200", "L4", "H200")):
        runner.submit({"job": job, "kind": kind, "checkpoint": None, "base_dir": None, "keep": False})
    assert [runner.free(kind) for kind in ("H100", "H200", "L4")] == [1, 0, 0]
    done = [event.job for _ in range(6) for event in runner.wait(0.01) if event.kind == "done"]
    assert sorted(done) == [0, 1, 2]
    assert sorted(runner.calls) == [("H200-a", "run"), ("H200-a", "run"), ("own-a", "run")]


@needs_ray
def test_two_devices_of_one_name_are_still_two(start: Any) -> None:
    other = {"H100-b": {"device": "H100 PCIe"}}
    runner = start({"H100-a": H100, "H100-b": H100}, facts=other, places=("H100",), devices={})
    notes = settle(runner)
    assert hosts(runner) == {"H100-a"}
    assert "worker on H100-b left out: latencies on H100 are of H100, and it has H100 PCIe" in notes


@needs_ray
def test_a_kind_that_is_not_there_is_told_and_waited_for(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.runners.ray.NOBODY_SECONDS", 0.0)
    runner = start({"H100-a": H100}, places=("H100", "H200"), devices={})
    assert runner.free("H200") == 1  # one may wait
    notes = settle(runner)
    assert any("still no worker on H200" in note and "no node that could hold it on H200" in note for note in notes)
    runner.fake.resources["H200-a"] = {"CPU": 1.0, **H200}
    settle(runner)
    assert hosts(runner) == {"H100-a", "H200-a"}


@needs_ray
def test_without_latencies_every_kind_may_train(start: Any) -> None:
    runner = start({"H100-a": H100, "H200-a": H200})
    settle(runner)
    assert hosts(runner) == {"H100-a", "H200-a"}


@needs_ray
def test_each_kind_is_tuned_once_and_the_others_take_over(start: Any) -> None:
    from archsearch.runners.ray_intake import Kernels

    kept: dict[str, str] = {}
    kernels = Kernels("space", 60.0, False, {}, kept.__setitem__)
    runner = start({"H100-a": H100, "H100-b": H100, "H100-c": H100, "H200-a": H200}, kernels=kernels)
    notes = settle(runner)
    assert hosts(runner) == {"H100-a", "H100-b", "H100-c", "H200-a"}
    assert sorted(call for call in runner.calls if call[1] == "tune") == [("H100-a", "tune"), ("H200-a", "tune")]
    installed = sorted(call for call in runner.calls if call[1].startswith("install"))
    assert installed == [("H100-b", "install rows of H100-a"), ("H100-c", "install rows of H100-a")]
    assert kept == {"H100": "rows of H100-a", "H200": "rows of H200-a"}
    assert "H100: 3 launches tuned" in notes


@needs_ray
def test_a_worker_of_another_version_is_left_out(start: Any) -> None:
    other = {"versions": {**versions(), "torch": "2.11.0"}}
    runner = start({"H100-a": H100, "H100-b": H100}, facts={"H100-b": other})
    notes = settle(runner)
    assert hosts(runner) == {"H100-a"}
    assert any("worker on H100-b left out: torch 2.11.0 there and" in note for note in notes)


@needs_ray
def test_when_all_are_left_out_the_launch_says_why(start: Any) -> None:
    runner = start({"H100-a": H100}, facts={"H100-a": {"problem": "DataError: no 'text.txt' in /data"}})
    with pytest.raises(RunError, match=r"no worker can serve this study; worker on H100-a left out: DataError: no 'te"):
        settle(runner)


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
def test_one_job_may_wait_for_the_first_worker(start: Any) -> None:
    runner = start({})
    assert runner.free() == 1
    runner.submit({"job": 0, "checkpoint": None, "base_dir": None, "keep": False})
    assert runner.free() == 0
    settle(runner, 3)
    runner.fake.resources["H100-a"] = {"CPU": 1.0, **H100}
    events = []
    for _ in range(6):
        runner.look_at = 0.0
        events += runner.wait(0.01)
    assert [event.job for event in events if event.kind == "done"] == [0]


def test_how_many_workers_a_node_holds() -> None:
    node = {"CPU": 16.0, "GPU": 2.0, "memory": 64 * 2.0**30, "bench": 1.0}
    assert Need(cpus=1, gpus=0.25).fits(node) == 8
    assert Need(cpus=4, gpus=0.1).fits(node) == 4
    assert Need(cpus=1, memory=24 * 2**30).fits(node) == 2
    assert Need(cpus=1, resources={"bench": 1}).fits(node) == 1
    assert Need(cpus=1, gpus=4).fits(node) == 0
    assert Need(cpus=1, accelerator="H100").fits(node) == 0
    assert Need(cpus=1, accelerator="H100").fits({**node, "accelerator_type:H100": 1.0}) == 16


def test_demands_of_a_space() -> None:
    assert launch_ray.need_of(Runtime(), "cuda") == Need(cpus=1, gpus=1)
    assert launch_ray.need_of(Runtime(threads=4), "cpu") == Need(cpus=4)
    text = {"gpus_per_trial": "1/4", "memory_per_trial": "8 GiB", "resources": {"fast": 1}, "accelerator": "H100"}
    need = launch_ray.need_of(Runtime.model_validate(text), "cuda")
    assert str(need) == "1 CPUs, 0.25 GPUs, 8 GiB, 1 fast, a H100"
    with pytest.raises(RunError, match="of no use on device cpu"):
        launch_ray.need_of(Runtime(gpus_per_trial=1), "cpu")
    with pytest.raises(RunError, match=r"gpus_per_trial is 1.5; expected a fraction"):
        launch_ray.need_of(Runtime(gpus_per_trial=1.5), "cuda")


def test_devices_are_remembered_by_place(tmp_path: Path) -> None:
    known = launch_ray.Memory(RunFolder(tmp_path))
    assert known.devices() == {}
    known.keep_device("H100", "NVIDIA H100 80GB HBM3")
    known.keep_device("H200", "NVIDIA H200")
    assert launch_ray.Memory(RunFolder(tmp_path)).devices() == {
        "H100": "NVIDIA H100 80GB HBM3",
        "H200": "NVIDIA H200",
    }
    known.keep_device(None, "AMD EPYC")
    assert launch_ray.Memory(RunFolder(tmp_path)).devices()[None] == "AMD EPYC"


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


@needs_ray
def test_nobody_at_the_address_is_known_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(RunError, match=f"cannot reach a Ray cluster at {address}: Connection refused"):
            connect(address, "test")


def test_a_worker_that_lacks_something_says_so(tmp_path: Path) -> None:
    setup = {"entry": "archsearch.trial:run_trial", "device": "cpu", "task": {}, "base_dir": None}
    setup |= {"variables": {}, "corpus_sha256": None, "storage": None, "shared": [str(tmp_path / "word"), "abc"]}

    def problem(**changed: Any) -> str:
        worker = TrialWorker(json.dumps({**setup, **changed}))
        return str(json.loads(worker.hello()).get("problem"))

    assert "is not the same folder here as at the driver; put --run-dir" in problem()
    (tmp_path / "word").write_text("another")
    assert "is not the same folder here" in problem()
    wrong = problem(shared=None, corpus_sha256="0" * 64, task={"corpus": "nowhere.txt"}, base_dir=str(tmp_path))
    assert wrong.startswith("DataError: corpus")
    assert "nosuch" in problem(shared=None, storage="nosuch://bucket")
