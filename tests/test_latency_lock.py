"""The device lock between real processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from archsearch.latency.lock import DeviceLock, device_key, lock_folder

Start = Callable[..., subprocess.Popen[bytes]]


# what the other processes run; `say` reaches the test at once, `wait` until the test answers
PRELUDE = """
import os, sys, time
from archsearch.latency.lock import DeviceLock
lock = DeviceLock("cpu")
def say(word): print(word, flush=True)
def wait(): sys.stdin.readline()
def log(word):
    with open(sys.argv[1], "a") as file: file.write(f"{os.getpid()} {word}\\n")
"""


TRAINER = """
say("ready")
while True:
    with lock.shared():
        log("enters")
        time.sleep(0.03)
        log("leaves")
"""


HOLDS_SHARED = "with lock.shared(): say('holds'); wait()\nsay('over'); wait()"


HOLDS_EXCLUSIVE = "with lock.exclusive(): say('holds'); wait()\nsay('over'); wait()"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a process that shares a temp folder with this one; what still runs at the end is killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PRELUDE + code, str(tmp_path / "log")]
        # unbuffered, so that what was not read yet is seen by select
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def answer(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")


def is_silent(process: subprocess.Popen[bytes]) -> bool:
    """Nothing heard for a while; a process that should wait fails this if it goes on instead."""
    assert process.stdout is not None
    return not select.select([process.stdout], [], [], 0.2)[0]


def test_a_measurement_waits_for_the_step_to_end(start: Start) -> None:
    trainer = start(HOLDS_SHARED)
    assert heard(trainer) == "holds"
    measurer = start("say('asks')\n" + HOLDS_EXCLUSIVE)
    assert heard(measurer) == "asks"
    assert is_silent(measurer)
    answer(trainer)
    assert heard(measurer) == "holds"


def test_steps_share_and_wait_for_a_measurement(start: Start) -> None:
    trainers = [start(HOLDS_SHARED) for _ in range(2)]
    assert [heard(trainer) for trainer in trainers] == ["holds"] * 2
    for trainer in trainers:
        answer(trainer)
        assert heard(trainer) == "over"
    lock = DeviceLock("cpu")
    with lock.exclusive():
        late = start("say('asks')\n" + HOLDS_SHARED)
        assert heard(late) == "asks"
        assert is_silent(late)
    assert heard(late) == "holds"
    lock.close()


@pytest.mark.timeout(60)
def test_a_stream_of_trainers_starves_no_measurement(start: Start, tmp_path: Path) -> None:
    """Steps overlap without end, so that without the turnstile the device would hardly ever be free."""
    trainers = [start(TRAINER) for _ in range(4)]
    assert [heard(trainer) for trainer in trainers] == ["ready"] * 4
    lock = DeviceLock("cpu")
    with (tmp_path / "log").open("a") as log:
        for _ in range(5):
            time.sleep(0.02)
            print(0, "asks", file=log, flush=True)
            with lock.exclusive():
                print(0, "measures", file=log, flush=True)
                time.sleep(0.01)
                print(0, "is done", file=log, flush=True)
    lock.close()
    stepping: set[str] = set()
    state, steps = "is done", dict.fromkeys(("asks", "measures", "is done"), 0)
    for line in (tmp_path / "log").read_text().splitlines():
        who, what = line.split(maxsplit=1)
        if what == "enters":
            stepping.add(who)
            steps[state] += 1
        elif what == "leaves":
            stepping.remove(who)
        else:
            state = what
            assert state != "measures" or not stepping, "a measurement began within a step"
    assert steps["measures"] == 0, "a step began within a measurement"
    assert steps["is done"] > 0
    assert steps["asks"] < 100, "a measurement waits for one step of each trainer; starving, it waits for many"


@pytest.mark.parametrize("held", [HOLDS_SHARED, HOLDS_EXCLUSIVE], ids=["shared", "exclusive"])
def test_a_killed_holder_lets_go(start: Start, held: str) -> None:
    holder = start(held)
    assert heard(holder) == "holds"
    waiting = start("say('asks')\n" + HOLDS_EXCLUSIVE)
    assert heard(waiting) == "asks"
    assert is_silent(waiting)
    holder.send_signal(signal.SIGKILL)
    assert heard(waiting) == "holds"


def test_a_measurer_killed_in_line_stops_nobody(start: Start) -> None:
    trainer = start(HOLDS_SHARED)
    assert heard(trainer) == "holds"
    in_line = start("say('asks')\n" + HOLDS_EXCLUSIVE)
    assert heard(in_line) == "asks"
    assert is_silent(in_line)
    late = start("say('asks')\n" + HOLDS_SHARED)
    assert heard(late) == "asks"
    assert is_silent(late), "trainers that come later queue behind a measurement"
    in_line.send_signal(signal.SIGKILL)
    assert heard(late) == "holds"


def test_an_error_inside_lets_go(start: Start) -> None:
    lock = DeviceLock("cpu")
    for context in (lock.shared, lock.exclusive):
        with pytest.raises(ZeroDivisionError), context():
            raise ZeroDivisionError
    other = start(HOLDS_EXCLUSIVE)
    assert heard(other) == "holds"
    lock.close()


def test_locks_do_not_nest(start: Start) -> None:
    lock = DeviceLock("cpu")
    for outer in (lock.shared, lock.exclusive):
        for inner in (lock.shared, lock.exclusive):
            with outer(), pytest.raises(AssertionError, match="does not nest"):
                inner().__enter__()
    with lock.exclusive():
        pass
    lock.close()


def test_each_physical_device_has_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_key("cpu") == "cpu"
    assert device_key("cuda:1") == "cuda-GPU-1"
    assert device_key("cuda") == "cuda-GPU-3"
    assert device_key("mps:0") == "mps-0"


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert lock_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "archsearch-12345").mkdir()
    with pytest.raises(PermissionError, match="set TMPDIR"):
        lock_folder()
