"""Worker processes: reused while healthy, killed when they hang, replaced when they die, gone with their driver."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archsearch.errors import RunError
from archsearch.runners import Event
from archsearch.runners.local import LocalRunner

FAULTY = (sys.executable, str(Path(__file__).parent / "faulty_worker.py"))


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[LocalRunner]:
    made = LocalRunner(2, tmp_path / "logs", threads=1, trial_timeout=1.5, command=FAULTY)
    yield made
    made.close()


def finish(runner: LocalRunner, n_jobs: int) -> dict[int, Event]:
    ended: dict[int, Event] = {}
    until = time.monotonic() + 30
    while len(ended) < n_jobs:
        assert time.monotonic() < until, f"only {sorted(ended)} of {n_jobs} ended"
        ended.update({event.job: event for event in runner.wait(0.5) if event.kind != "progress"})
    return ended


def test_workers_are_reused_and_prints_go_to_the_log(runner: LocalRunner, tmp_path: Path) -> None:
    pids = set()
    for round_ in range(3):
        for i in range(2):
            assert runner.free() == 2 - i
            runner.submit({"job": 2 * round_ + i, "do": "print", "load": "x" * 200_000})
        for event in finish(runner, 2).values():
            pids.add(event.data["pid"])
            assert event.data["size"] == 200_000
            assert event.data["threads"] == "1"
    assert len(pids) == 2
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert logs.count("not part of the protocol {") == 6


@pytest.mark.parametrize(
    ("do", "reason", "message"),
    [
        ("segfault", "crash", "was ended by SIGSEGV"),
        ("exit", "crash", "exited with code 3"),
        ("hang", "timeout", "took longer than 1.5 s"),
    ],
)
def test_faults_cost_one_job_and_the_worker_is_replaced(
    runner: LocalRunner, do: str, reason: str, message: str
) -> None:
    runner.submit({"job": 0, "do": do})
    runner.submit({"job": 1, "do": "nothing"})
    ended = finish(runner, 2)
    assert (ended[0].kind, ended[0].reason) == ("lost", reason)
    assert message in (ended[0].message or "")
    assert ended[1].kind == "done"
    for i in (2, 3):  # both places work again
        runner.submit({"job": i, "do": "nothing"})
    assert {event.kind for event in finish(runner, 2).values()} == {"done"}


def test_a_worker_that_cannot_start_is_an_error_and_not_a_loop(tmp_path: Path) -> None:
    runner = LocalRunner(1, tmp_path / "logs", command=(*FAULTY, "--broken"))
    try:
        with pytest.raises(RunError, match=r"a worker process could not start \(exited with code 1\): cannot import"):
            finish(runner, 1)
    finally:
        runner.close()


def test_a_worker_that_does_not_fit_its_limit_names_the_limit(tmp_path: Path) -> None:
    runner = LocalRunner(1, tmp_path, memory_limit=50 << 20)
    try:
        with pytest.raises(RunError, match=r"a worker process could not start within runtime.memory_limit, 50 MiB \("):
            finish(runner, 1)
    finally:
        runner.close()


def test_close_leaves_no_process(tmp_path: Path) -> None:
    runner = LocalRunner(1, tmp_path / "logs", command=FAULTY)
    runner.submit({"job": 0, "do": "hang"})
    while not any(event.kind == "progress" for event in runner.wait(1.0)):
        continue
    pid = runner.workers[0].process.pid
    runner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


DRIVER = """
import sys
from pathlib import Path
from archsearch.runners.local import LocalRunner
runner = LocalRunner(1, Path(sys.argv[1]), command=sys.argv[2:])
runner.submit({"job": 0, "do": "hang"})
while not runner.wait(1.0):
    pass
print(runner.workers[0].process.pid, flush=True)
while True:
    runner.wait(1.0)
"""


def alive(pid: int) -> bool:
    try:
        state: Any = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return bool(state != "Z")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_workers_end_with_a_driver_that_was_killed(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "logs"), *FAULTY], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    with driver.stdout:
        pid = int(driver.stdout.readline())
    assert alive(pid)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)
