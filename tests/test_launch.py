"""`archsearch launch` as a person runs it: real workers, real text, kills at random moments, refusals, exit codes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from archsearch.errors import RunError
from archsearch.launch import check_kind
from archsearch.store import RunFolder

SPACE = """
archsearch: 1
name: small
task: {corpus: text.txt}
scales:
  proxy:  {n_blocks: 2, d_model: 32, context: 32}
  target: {n_blocks: 2, d_model: 32, context: 64, dtype: float32}
mixers:
  full: {kind: attention, head_dim: 16}
  swa:  {kind: attention, head_dim: 16, window: {choice: [4, 8]}}
ffns:
  dense: {kind: swiglu, expand: {choice: [1, 2]}}
layout: {mixer: {each: [full, swa]}, ffn: dense}
objectives: [val_bpb, {name: decode_ms}]
train: {tokens: 8192, batch_tokens: 256, val_tokens: 1024, lr: 3e-3}
search: {trials: 5}
runtime: {workers: 2, threads: 1, latency_repeats: 5}
"""
MAIN = [sys.executable, "-m", "archsearch"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    words = random.Random(0).choices(["state", "query", "key", "value", "window", "block"], k=30_000)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9)))
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def launch(here: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAIN, "launch", "space.yaml", *options], cwd=here, capture_output=True, text=True, timeout=240, check=False
    )


def test_three_kills_lose_nothing(here: Path) -> None:
    dice = random.Random(os.getpid())
    kept: list[str] = []
    lines: list[str] = []
    for _ in range(3):
        driver = subprocess.Popen(
            [*MAIN, "launch", "space.yaml"], cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        trials = here / "runs" / "small" / "trials.jsonl"
        before = len(lines)
        until = time.monotonic() + 60
        while driver.poll() is None and time.monotonic() < until:  # let it get somewhere, then strike at random
            if trials.exists() and trials.read_bytes().count(b"\n") > before:
                break
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 1.0))
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        whole = trials.read_text().rpartition("\n")[0]
        lines = whole.splitlines()
        assert lines[: len(kept)] == kept
        kept = lines
    done = launch(here)
    assert done.returncode == 0, done.stderr
    folder = RunFolder.open(here / "runs" / "small")
    records = folder.records()
    assert (folder.path / "trials.jsonl").read_text().splitlines()[: len(kept)] == kept
    numbers = Counter(record.trial for record in records)
    assert max(numbers.values()) == 1
    assert sum(record.status == "complete" for record in records) == 5
    for name in ("front.json", "front.csv", "report.html", "front.png", "settings.json", "environment.json"):
        assert (folder.path / name).stat().st_size > 0
    assert "report: runs/small/report.html" in done.stdout
    again = launch(here)
    assert again.returncode == 0
    assert folder.records() == records


def test_a_changed_space_is_refused_with_a_diff_unless_extended(here: Path) -> None:
    (here / "space.yaml").write_text(SPACE.replace("trials: 5", "trials: 1"))
    assert launch(here).returncode == 0
    (here / "space.yaml").write_text(SPACE.replace("trials: 5", "trials: 2"))
    refused = launch(here)
    assert refused.returncode == 2
    assert "-search: {trials: 1}" in refused.stderr
    assert "+search: {trials: 2}" in refused.stderr
    assert "--extend" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert launch(here, "--extend").returncode == 0
    records = RunFolder.open(here / "runs" / "small").records()
    assert sum(record.status == "complete" for record in records) == 2
    (here / "text.txt").write_text((here / "text.txt").read_text() * 2)
    other = launch(here, "--extend")
    assert other.returncode == 2
    assert "sha256" in other.stderr


def test_a_second_launch_on_one_folder_is_refused(here: Path) -> None:
    folder = RunFolder(here / "runs" / "small")
    with folder.lock():
        refused = launch(here)
    assert refused.returncode == 2
    assert f"is in use by process {os.getpid()}" in refused.stderr


def test_an_interrupt_stops_cleanly_and_says_how_to_resume(here: Path) -> None:
    (here / "space.yaml").write_text(SPACE.replace("tokens: 8192", "tokens: 50M"))
    driver = subprocess.Popen(
        [*MAIN, "launch", "space.yaml"], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    log = here / "runs" / "small" / "study.journal"
    while not (log.exists() and log.stat().st_size > 500) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "the same command resumes: archsearch launch space.yaml" in stderr
    assert "Traceback" not in stderr


FAULTS = {
    "non_finite": ("lr: 3e-3", "lr: 1e30", "became non-finite at step"),
    "out_of_memory": ("context: 64, dtype", "context: 64, vocab_size: 2000000000, dtype", "building the model"),
    "timeout": ("workers: 2", "trial_timeout: 4, workers: 2", "took longer than 4 s"),
}


@pytest.mark.parametrize("reason", sorted(FAULTS))
def test_real_faults_become_records_and_the_study_goes_on(here: Path, reason: str) -> None:
    old, new, message = FAULTS[reason]
    text = SPACE.replace(old, new).replace("trials: 5", "trials: 2")
    if reason == "timeout":
        text = text.replace("tokens: 8192", "tokens: 500M")
    (here / "space.yaml").write_text(text)
    done = launch(here, "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [event for event in events if event["event"] == "trial"]
    assert {event["reason"] for event in failed} == {reason}
    assert all(message in event["message"] for event in failed)
    assert events[-1] == {"event": "end", "run": "runs/small", "interrupted": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch", "nowhere.yaml"], "no such file"),
        (["check", "nowhere.yaml"], "no such file"),
        (["front", "runs/none"], "is not a run folder"),
        (["report", "runs/none"], "is not a run folder"),
        (["recipes", "jmba"], "Did you mean 'jamba'"),
        (["launch", "space.yaml", "--device", "tpu"], "expected cpu, cuda or cuda:<index>"),
        (["launch", "space.yaml", "--device", "cuda:9"], "is not there"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(here: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run([*MAIN, *arguments], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_objectives_that_name_a_device_are_measured_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.launch.cpu_model", lambda: "AMD EPYC 9654")
    check_kind((), ())
    check_kind(("epyc",), ())
    with pytest.raises(
        RunError, match="are to be measured on H100, and this machine has AMD EPYC 9654; leave `device` "
    ):
        check_kind(("H100",), ())
    with pytest.raises(RunError, match="are to be measured on EPYC and H100"):
        check_kind(("EPYC", "H100"), ())
    names = subprocess.CompletedProcess([], 0, stdout="NVIDIA H100 80GB HBM3\nNVIDIA H200\n")
    monkeypatch.setattr("archsearch.launch.subprocess.run", lambda *command, **options: names)
    check_kind(("H200",), (1,))
    with pytest.raises(RunError, match="this machine has NVIDIA H100 80GB HBM3;"):
        check_kind(("H200",), (0,))
    with pytest.raises(RunError, match="this machine has NVIDIA H100 80GB HBM3, NVIDIA H200;"):
        check_kind(("H200",), (0, 1))  # half of the trials would be timed on the other
