"""Studies on Ray: nodes that go and come, workers that crash and hang, a killed driver; refusals; the real trial."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from spaces import TINY

from archsearch.store import RunFolder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra archsearch[ray] is not installed"
)

TESTS = Path(__file__).parent
NODE_LOSS_SECONDS, JOIN_SECONDS = 15.0, 10.0
SPACE = (
    TINY.replace("n_blocks: 4", "n_blocks: 6")
    .replace("n_blocks: 8", "n_blocks: 6")
    .replace("{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}", "{each: [swa, full]}")
    .replace("trials: 4", "trials: 24")
) + "runtime: {trial_timeout: 5 s}\n"
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 only; read when Ray is imported
    "PYTHONPATH": str(TESTS),
    "OMP_NUM_THREADS": "1",
}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
os.environ[LOOPBACK] = ENVIRONMENT[LOOPBACK]  # now: another test may import Ray before the fixture is made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no trials and two nodes for two trials each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        made.add_node(num_cpus=2)
        made.add_node(num_cpus=2)
        yield made
        made.shutdown()


def drive(address: str, space: Path, module: str = "ray_faults", **variables: str) -> "subprocess.Popen[bytes]":
    """Start a driver of a module's trials; what it says is appended to driver.log."""
    with (space.parent / "driver.log").open("ab") as log:
        command = [sys.executable, str(TESTS / "ray_driver.py"), address, str(space), module]
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT, **variables})


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole JSON lines of a file that others append to."""
    return [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"] if path.exists() else []


def wait_for(what: str, found: Any, seconds: float) -> Any:
    until = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < until, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.05)
    return result


def test_a_study_survives_what_clusters_do(cluster: Any, tmp_path: Path) -> None:
    space, log, trials = tmp_path / "space.yaml", tmp_path / "log.jsonl", tmp_path / "run" / "trials.jsonl"
    space.write_text(SPACE)

    def ran() -> list[dict[str, Any]]:
        return [record for record in lines(trials) if record["status"] in ("complete", "infeasible")]

    driver = drive(cluster.address, space)
    try:
        wait_for("the 4th result", lambda: len(ran()) >= 4, 40)

        def at_work() -> dict[str, Any] | None:
            """The newest line, if it is of a trial that is far from its end and will get there."""
            newest = lines(log)[-1]
            return newest if newest["what"] == "step" and newest["step"] <= 4 and newest["job"] not in (3, 6) else None

        victim = wait_for("a trial in its first steps", at_work, 20)
        (doomed,) = [node for node in cluster.worker_nodes if node.node_id == victim["node"]]
        killed_at = time.time()
        cluster.remove_node(
            doomed, allow_graceful=False
        )  # on a busy machine the victim itself may end before this does
        last = {e["job"]: e for e in lines(log)}
        cut = {job for job, e in last.items() if e["node"] == doomed.node_id and e["step"] < 10}
        assert cut, "no trial was cut off"

        def goes_on() -> bool:
            moved = [e for e in lines(log) if e["what"] == "start" and e["job"] in cut and e["at"] > killed_at]
            return any(e["node"] != doomed.node_id for e in moved)

        wait_for("a trial of the lost node going on elsewhere", goes_on, NODE_LOSS_SECONDS)

        newcomer = cluster.add_node(num_cpus=2)
        wait_for(
            "a trial on the new node", lambda: any(e["node"] == newcomer.node_id for e in lines(log)), JOIN_SECONDS
        )

        wait_for("the 12th result", lambda: len(ran()) >= 12, 40)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        before = len(lines(trials))
        assert len(ran()) < 24, "the driver was killed too late"
        driver = drive(cluster.address, space)
        assert driver.wait(timeout=60) == 0, (tmp_path / "driver.log").read_text()[-3000:]
        assert before < len(lines(trials))
    finally:
        driver.kill()
        driver.wait()

    records = RunFolder.open(tmp_path / "run").records()
    ended = [record for record in records if record.status in ("complete", "infeasible")]
    assert len(ended) == 24
    assert len({record.arch_id for record in ended}) == 24
    assert max(Counter(record.trial for record in records).values()) == 1
    by_reason = Counter(record.reason for record in ended)
    assert by_reason == {None: 22, "timeout": 1, "non_finite": 1}
    crashed = next(record for record in ended if record.trial == 3)
    assert crashed.status == "complete"
    assert "trial 3: the worker process" in (tmp_path / "driver.log").read_text()
    steps = Counter((e["job"], e["step"]) for e in lines(log) if e["what"] == "step")
    assert max(steps.values()) == 1, "a step was trained twice although its checkpoint was there"
    known = set(steps) | {(e["job"], e["step"]) for e in lines(log) if e["what"] == "start"}  # saved, killed, not noted
    done = {record.trial for record in ended if record.reason != "timeout"}
    assert {(job, step) for job in done for step in range(1, 11)} <= known


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def client(cluster: Any) -> Iterator[str]:
    """The address of a Ray Client server at the head."""
    pytest.importorskip("grpc", reason="ray[client] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ray.util.client.server", f"--address={cluster.address}", "--mode=proxy"]
    server = subprocess.Popen(
        [*command, "--host=127.0.0.1", f"--port={port}"], start_new_session=True, stderr=subprocess.DEVNULL
    )
    wait_for("Ray Client's server listening", lambda: is_open(port), 60)
    yield f"ray://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_workers_of_a_killed_driver_behind_ray_client_end_before_its_trials_go_on(
    cluster: Any, client: str, tmp_path: Path
) -> None:
    """Ray Client's server keeps them for half a minute."""
    space, log = tmp_path / "space.yaml", tmp_path / "log.jsonl"
    space.write_text(SPACE.replace("trials: 24", "trials: 3").replace("trial_timeout: 5 s", "trial_timeout: 60 s"))
    driver, room = drive(client, space, "ray_slow"), None
    try:
        wait_for("trials on their way", lambda: any(line["step"] >= 5 for line in lines(log)), 120)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        before = lines(log)
        room = cluster.add_node(num_cpus=4)  # the next driver need not wait for the nodes that are taken
        driver = drive(client, space, "ray_slow")
        assert driver.wait(timeout=150) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
        if room is not None:
            cluster.remove_node(room)
    after, left = lines(log)[len(before) :], {line["pid"] for line in before}
    theirs = [line["at"] for line in after if line["pid"] in left]
    ours = [line["at"] for line in after if line["pid"] not in left]
    assert theirs, "the workers ended with the driver: there was nothing to test"
    assert max(theirs) < min(ours)
    steps = Counter((line["job"], line["step"]) for line in lines(log) if line["what"] == "step")
    assert max(steps.values()) == 1, "a step was trained twice"
    records = RunFolder.open(tmp_path / "run").records()
    assert [record.status for record in records].count("complete") == 3
    assert len({record.arch_id for record in records if record.status == "complete"}) == 3


def test_each_latency_is_measured_on_the_device_that_it_names(cluster: Any, tmp_path: Path) -> None:
    """The cluster is found as a job finds it: `auto` and RAY_ADDRESS. One kind has Ray's mark, one is the user's."""
    marked = cluster.add_node(num_cpus=1, resources={"accelerator_type:H100": 1})
    owned = cluster.add_node(num_cpus=1, resources={"H200": 1})
    space, log = tmp_path / "space.yaml", tmp_path / "log.jsonl"
    goals = "".join(f", {{name: decode_ms, at: {{device: {kind}}}}}" for kind in ("H100", "H200"))
    space.write_text(SPACE.replace(", {name: state_bytes}", goals).replace("trials: 24", "trials: 6"))
    try:
        driver = drive("auto", space, "ray_kinds", RAY_ADDRESS=cluster.address)
        assert driver.wait(timeout=60) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
        cluster.remove_node(marked)
        cluster.remove_node(owned)
    nodes = {"H100": marked.node_id, "H200": owned.node_id}
    assert {(line["kind"], line["node"]) for line in lines(log)} == set(nodes.items())
    complete = [record for record in RunFolder.open(tmp_path / "run").records() if record.status == "complete"]
    assert len(complete) == 6
    for record in complete:
        assert set(record.objectives) == {"val_bpb", "decode_ms_target_H100", "decode_ms_target_H200"}
        assert [line["trained"] for line in lines(log) if line["job"] == record.trial] == [False, False, True]


REAL = """
archsearch: 1
name: real
task: {corpus: text.txt}
scales:
  proxy:  {n_blocks: 2, d_model: 32, context: 32}
  target: {n_blocks: 2, d_model: 32, context: 64, dtype: float32}
mixers:
  full: {kind: attention, head_dim: 16}
  swa:  {kind: attention, head_dim: 16, window: 8}
ffns:
  dense: {kind: swiglu, expand: 1}
layout: {mixer: {each: [full, swa]}, ffn: dense}
objectives: [val_bpb, {name: decode_ms}]
train: {tokens: 8192, batch_tokens: 256, val_tokens: 1024, lr: 3e-3}
search: {trials: 3}
runtime: {latency_repeats: 5, workers: 1}
"""


def test_the_command_trains_on_a_cluster_through_a_storage(cluster: Any, tmp_path: Path) -> None:
    storage = tmp_path / "far"
    (tmp_path / "space.yaml").write_text(REAL.replace("workers: 1", f"workers: 1, storage: 'file://{storage}'"))
    (tmp_path / "text.txt").write_text("state query key value window block\n" * 2000)
    command = [sys.executable, "-m", "archsearch", "launch", "space.yaml", "--runner", "ray", "--json"]
    done = subprocess.run(
        [*command, "--address", cluster.address],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = RunFolder.open(tmp_path / "runs" / "real")
    complete = [record for record in folder.records() if record.status == "complete"]
    assert len(complete) == 3
    assert all(record.objectives["decode_ms"].value > 0 for record in complete)
    kept = [path.stem for path in (folder.path / "checkpoints").glob("*.safetensors")]
    assert kept, "the front's checkpoints are in the run folder, for export"
    assert set(kept) <= {str(record.trial) for record in complete}
    assert not list(storage.iterdir()), "the storage holds checkpoints that nobody needs"
    assert folder.read_json("cluster.json")["kind"]
    assert "Ray cluster" in done.stdout


OWN = """
import os, sys
from pathlib import Path
from archsearch.runners.ray_cluster import Need, connect
os.environ["HOME"] = sys.argv[1]
cluster = connect(None, "test")
cluster.ask(Need())
def children(pid):
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if path.read_text().rsplit(")", 1)[1].split()[1] == str(pid):
                yield from (int(path.parent.name), *children(int(path.parent.name)))
        except OSError:
            continue
ours = set()
for pid in (os.getpid(), *children(os.getpid())):
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            ours.add(os.readlink(path))
        except OSError:
            continue
lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
print("listening", {p[1].split(":")[0] for p in lines if p[3] == "0A" and f"socket:[{p[9]}]" in ours})
try:
    cluster.ask(Need(gpus=1))
except ValueError as error:
    print(error)
cluster.close()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_cluster_of_our_own_can_be_reached_from_this_machine_only(tmp_path: Path) -> None:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", OWN, str(tmp_path)]
    done = subprocess.run(command, env=keep, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "listening {" in done.stdout
    heard = done.stdout.split("listening {")[1].split("}")[0].replace("'", "").split(", ")
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(heard) <= loopback
    assert not (tmp_path / ".ray").exists(), "Ray left a token in the home folder"
    assert "a worker asks for 1 CPUs, 1 GPUs, and this machine has" in done.stdout
