"""The Ray runner's decisions, on made-up clusters: who may work, on which jobs, and whose kernels are tuned."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray_pool import H100, H200, fake_runner, hosts, needs_ray, settle

from archsearch import launch_ray
from archsearch.errors import RunError
from archsearch.runners.ray_cluster import Need
from archsearch.runners.ray_worker import TrialWorker, versions
from archsearch.settings import Runtime
from archsearch.store import RunFolder


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a runner on the nodes that a test wants."""
    return partial(fake_runner, monkeypatch)


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
    kernels = Kernels("space", 300, 60.0, False, {}, kept.__setitem__)
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
