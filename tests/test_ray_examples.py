"""The cluster files of examples/: held against the schemas that Ray has, and the SLURM script run on this machine."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra archsearch[ray] is not installed", allow_module_level=True)

from test_ray import ENVIRONMENT, REAL

from archsearch.store import RunFolder

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"
# a job of two nodes, both this machine: what SLURM's commands say and do
SCONTROL = "#!/bin/bash\necho 127.0.0.1; echo 127.0.0.1\n"
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do
  case $1 in -w | --exclude) shift 2 ;; *) shift ;; esac
done
echo "srun $*" >> "$SRUN_LOG"
exec "$@"
"""


def test_ray_up_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    made: dict[str, Any] = prepare_config(config)
    validate_config(made)
    assert made["available_node_types"]["head"]["resources"] == {"CPU": 0}  # no trial beside the driver
    made["workers"] = 1
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(made)


KUBERAY = {  # json names of KubeRay's v1 types: RayJobSpec, RayClusterSpec, AuthOptions, and those of a group
    "auth": {"mode", "secretName", "enableK8sTokenAuth"},
    "job": {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec", "submissionMode"},
    "cluster": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"},
    "group": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


def test_the_kubernetes_file_says_what_kuberay_reads() -> None:
    import ray

    claim, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec.keys() <= KUBERAY["job"]
    assert cluster.keys() <= KUBERAY["cluster"]
    assert cluster["authOptions"].keys() <= KUBERAY["auth"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["rayVersion"] == ray.__version__
    for group in groups:
        assert group.keys() <= KUBERAY["group"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # numbers are refused
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    mounts = {mount["mountPath"] for mount in groups[0]["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert {"/runs", "/space"} == mounts
    assert "/space/space.yaml" in spec["entrypoint"]
    assert "--run-dir /runs" in spec["entrypoint"]


def test_the_slurm_script_runs_a_study(tmp_path: Path) -> None:
    tools, log = tmp_path / "bin", tmp_path / "srun.log"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "space.yaml").write_text(REAL.replace("trials: 3", "trials: 1").replace("workers: 1", "workers: 2"))
    (tmp_path / "text.txt").write_text("state query key value window block\n" * 2000)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid())}
    job |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "0", "SRUN_LOG": str(log)}
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    only_here = {name: ENVIRONMENT[name] for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",)}
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    # `ray start` notes its cluster under /tmp/ray, where other tests would find it; sockets need a short path
    with TemporaryDirectory(prefix="r", dir="/tmp") as aside, (tmp_path / "out").open("w") as out:
        started = subprocess.Popen(
            ["bash", str(CLUSTER / "slurm.sbatch"), "space.yaml"],
            cwd=tmp_path,
            env={**without, **job, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": aside, **only_here},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            code = started.wait(timeout=200)
            until = time.monotonic() + 30
            while (left := session(started.pid)) and time.monotonic() < until:
                time.sleep(0.2)
        finally:
            for pid in session(started.pid):
                os.kill(pid, signal.SIGKILL)
    assert code == 0, (tmp_path / "out").read_text()[-3000:]
    calls = log.read_text()
    assert calls.count("ray start --head") == 1
    assert calls.count("ray start --address=127.0.0.1:") == 1
    records = RunFolder.open(tmp_path / "runs" / "real").records()
    assert [record.status for record in records].count("complete") == 1
    assert not left, "processes outlive the script"


def session(leader: int) -> list[int]:
    """Processes that were started from one, however they are related now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(of) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found
