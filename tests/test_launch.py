"""`archsearch launch` as a person runs it: real workers, real text, kills at random moments, refusals, exit codes."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from archsearch import launch as launching
from archsearch.cli import main
from archsearch.data import pack
from archsearch.errors import RunError
from archsearch.launch import Options, check_kind, check_room
from archsearch.recipes import load_recipe
from archsearch.space import SearchSpace
from archsearch.store import RunFolder
from archsearch.study import Listener

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
ONE_WORKER = SPACE.replace("workers: 2", "workers: 1")  # each imports torch
MAIN = [sys.executable, "-m", "archsearch"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    words = random.Random(0).choices(["state", "query", "key", "value", "window", "block"], k=30_000)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9)))
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


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
    again = launch(here, "--workers", "1")
    assert again.returncode == 0
    assert folder.records() == records


def test_a_changed_space_is_refused_with_a_diff_unless_extended(here: Path) -> None:
    (here / "space.yaml").write_text(ONE_WORKER.replace("trials: 5", "trials: 1"))
    assert launch(here).returncode == 0
    (here / "space.yaml").write_text(ONE_WORKER.replace("trials: 5", "trials: 2"))
    refused = launch(here)
    assert refused.returncode == 2
    assert "-search: {trials: 1}" in refused.stderr
    assert "+search: {trials: 2}" in refused.stderr
    assert "--extend" in refused.stderr
    assert "Traceback" not in refused.stderr
    extended = launch(here, "--extend")
    assert extended.returncode == 0
    assert "note: the space changed: of 1 trials that ran 1 stay, 0 are outside of it now\n" in extended.stdout
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
    options = ["--run-dir", "my runs", "--workers", "1", "--device", "cpu"]
    driver = subprocess.Popen(
        [*MAIN, "launch", "space.yaml", *options], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    log = here / "my runs" / "small" / "study.journal"
    while not (log.exists() and log.stat().st_size > 500) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert (
        "the same command resumes: archsearch launch space.yaml --run-dir 'my runs' --workers 1 --device cpu" in stderr
    )
    assert "Traceback" not in stderr


FAULTS = {
    "non_finite": ("lr: 3e-3", "lr: 1e30", "became non-finite at step"),
    "out_of_memory": (
        "context: 64, dtype",
        "context: 64, vocab_size: 200000000000, dtype",
        "takes at least 23.3 TiB and",
    ),
    "timeout": ("workers: 2", "trial_timeout: 4, workers: 2", "took longer than 4 s"),
}


@pytest.mark.parametrize("reason", sorted(FAULTS))
def test_real_faults_become_records_and_the_study_goes_on(here: Path, reason: str) -> None:
    old, new, message = FAULTS[reason]
    text = (SPACE if reason == "timeout" else ONE_WORKER).replace(old, new).replace("trials: 5", "trials: 2")
    if reason == "timeout":
        text = text.replace("tokens: 8192", "tokens: 500M")
    (here / "space.yaml").write_text(text)
    done = launch(here, "--json")
    assert done.returncode == 1, done.stderr  # no trial was completed
    assert done.stderr.endswith("there is no front: archsearch front runs/small says why\n")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [event for event in events if event["event"] == "trial"]
    assert {event["reason"] for event in failed} == {reason}
    assert all(message in event["message"] for event in failed)
    assert events[-1] == {"event": "end", "run": "runs/small", "interrupted": False, "complete": 0}


@pytest.fixture
def small_disk(here: Path) -> Iterator[Path]:
    """`runs` on a disk of its own that holds no checkpoint."""
    runs = here / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(runs)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a file system here")
    yield runs
    subprocess.run(["umount", str(runs)], check=True)


def test_a_full_disk_stops_the_study_with_nothing_recorded_and_it_goes_on(here: Path, small_disk: Path) -> None:
    stopped = launch(here)
    assert stopped.returncode == 2
    path = r"runs/small/checkpoints/(\d)\.safetensors"
    told = (
        rf"error: trial (\d) cannot be run: {path}: No space left on device; make room there and give the same command "
    )
    found = re.match(told + r"again \(a study goes on where it stopped\)\n$", stopped.stderr)
    assert found is not None, stopped.stderr
    assert found[1] == found[2]
    folder = RunFolder.open(small_disk / "small")
    assert folder.records() == []
    assert not list((folder.path / "checkpoints").iterdir())
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = launch(here)
    assert done.returncode == 0, done.stderr
    assert Counter(record.status for record in folder.records())["complete"] == 5
    assert "exception" not in {record.reason for record in folder.records()}


def test_a_full_disk_of_the_driver_is_told_with_its_path(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def append_logs(self: object, logs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(here)
    monkeypatch.setattr("archsearch.study.journal._Backend.append_logs", append_logs)
    assert main(["launch", "space.yaml", "--device", "cpu"]) == 2
    told = "error: runs/small: No space left on device; make room there and give the same command again"
    assert capsys.readouterr().err.startswith(told)


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
        (["launch", "space.yaml", "--trials", "-3"], "--trials is -3; expected 1 or more"),
        (["launch", "space.yaml", "--workers", "0"], "--workers is 0; expected 1 or more"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(
    here: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(here)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_recipe_that_cannot_fit_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jamba, folder, listener = load_recipe("jamba"), RunFolder(tmp_path / "runs" / "jamba"), Notes()
    with monkeypatch.context() as patch:
        patch.setattr("archsearch.machine.free_memory", lambda: 23 << 30)
        expected = r"^jamba\.yaml: decode_ms at target scale \(51\.6G parameters, bfloat16\) takes at least 9[67]"
        with pytest.raises(RunError, match=expected + r".* GiB and the device has 23 GiB\. Make that scale smaller"):
            check_room(jamba, folder, (), listener)
        for room in (1 << 40, None):
            patch.setattr("archsearch.machine.free_memory", lambda room=room: room)
            check_room(jamba, folder, (), listener)
    sizes = subprocess.CompletedProcess([], 0, stdout="81559\n143771\n")
    monkeypatch.setattr("archsearch.launch.subprocess.run", lambda *command, **options: sizes)
    with pytest.raises(RunError, match=r"the device has 79\.6 GiB"):
        check_room(jamba, folder, (0,), listener)
    check_room(jamba, folder, (0, 1), listener)  # one of the two has the room
    assert not listener.notes
    assert not folder.path.exists()


def test_a_space_of_which_nothing_drawn_fits_says_so_and_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, folder, listener = SearchSpace.from_text(SPACE), RunFolder(tmp_path / "small"), Notes()
    for room, said in ((1 << 20, None), (200_000, "training at proxy scale"), (20_000, "decode_ms at target scale")):
        monkeypatch.setattr("archsearch.machine.free_memory", lambda room=room: room)
        listener.notes.clear()
        check_room(space, folder, (), listener)
        if said is None:
            assert not listener.notes
        else:
            (note,) = listener.notes
            assert note.startswith(f"of 32 candidates looked at none fits this device; the smallest: {said} (")


@pytest.mark.parametrize(
    ("layout", "n_asked"), [("[full]", 1), ("{each: [full, swa]}", 5), ("{pattern: {choice: [[full], [swa]]}}", 5)]
)
def test_where_nothing_is_left_to_choose_one_candidate_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, n_asked: int
) -> None:
    asked = []

    class Stopped(Exception):
        pass

    def study(*args: object, n_trials: int | None, **options: object) -> None:
        asked.append(n_trials)
        raise Stopped

    tree = {
        "archsearch": 1, "name": "one", "scales": {"proxy": {"n_blocks": 2, "d_model": 32, "context": 16}},
        "mixers": {name: {"kind": "attention", "head_dim": 16, "window": w} for name, w in (("full", 16), ("swa", 4))},
        "ffns": {"dense": {"kind": "swiglu"}}, "layout": {"mixer": yaml.safe_load(layout), "ffn": "dense"},
        "objectives": ["params"],
    }  # fmt: skip
    monkeypatch.setattr("archsearch.launch.Study", study)
    closed: list[bool] = []
    runner = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr("archsearch.launch.start_runner", lambda *args: runner)
    with pytest.raises(Stopped):
        launching.launch(
            SearchSpace.from_text(yaml.safe_dump(tree)), Options(run_dir=tmp_path, trials=5, device="cpu"), Notes()
        )
    assert asked == [n_asked]
    assert closed == [True]  # no worker stays when a study cannot begin


def test_a_run_keeps_its_tokenizer_and_says_what_is_lost(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"state": 0, "[UNK]": 1}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(here / "words.json"))
    (here / "texts").mkdir()
    (here / "text.txt").rename(here / "texts" / "text.txt")
    (here / "texts" / "latin.txt").write_bytes(b"\xe9\xe8")
    pack("texts", "words.json", here, here / "packed")
    content = json.loads((here / "words.json").read_text())
    (here / "words.json").unlink()

    class Stopped(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(launching, "start_runner", stop)
    notes = Notes()
    space = SearchSpace.from_text(SPACE.replace("text.txt", "packed"), base_dir=here)
    with pytest.raises(Stopped):
        launching.launch(space, Options(run_dir=here / "runs", device="cpu"), notes)
    run = RunFolder(here / "runs" / "small")
    assert run.read_json("tokenizer.json") == content
    told = run.read_json("environment.json")["tokenizer"]
    assert told["name"] == "words.json"
    assert told["loss"] in notes.notes
    assert "words.json loses text" in told["loss"]
    assert any(note.startswith("corpus: 1 skipped (not text): ") and "latin.txt" in note for note in notes.notes)
    plain = SearchSpace.from_text(SPACE.replace("text.txt", "texts").replace("small", "plain"), base_dir=here)
    with pytest.raises(Stopped):
        launching.launch(plain, Options(run_dir=here / "runs", device="cpu"), notes)
    run = RunFolder(here / "runs" / "plain")
    assert not (run.path / "tokenizer.json").exists()
    assert run.read_json("environment.json")["tokenizer"] == {"name": "bytes", "sha256": "bytes", "loss": None}


def test_options_are_checked_wherever_they_come_from() -> None:
    with pytest.raises(RunError, match="--workers is -1; expected 1 or more"):
        Options(workers=-1)


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
