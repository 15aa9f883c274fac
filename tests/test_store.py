"""The store under kill -9, torn lines, two writers, a full disk and hostile files."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import example_run
import pytest
from pydantic import ValidationError
from study_tools import die_at

from archsearch.errors import RunError
from archsearch.store import RunFolder, TrialRecord, environment


def make(path: Path) -> RunFolder:
    return example_run.write(path / "runs" / "toy", [])


def small(trial: int, **changes: Any) -> TrialRecord:
    at = "2026-03-01T08:00:00.000Z"
    fields = {"trial": trial, "status": "complete", "arch_id": "abc", "architecture": {}, "started": at, "finished": at}
    return TrialRecord.model_validate({**fields, **changes})


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    folder = example_run.write(tmp_path / "runs" / "toy")
    records = example_run.records()
    assert RunFolder.open(folder.path).records() == records
    lines = (folder.path / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == [record.trial for record in records]


def test_awkward_values_stay_one_line_of_json(tmp_path: Path) -> None:
    folder = make(tmp_path)
    record = small(
        0,
        status="infeasible",
        reason="non_finite",
        message="two\nlines\u2028\r\x00 and a file name \udcff",
        holes={"a": True, "b": 1, "c": 1.0, "d": "1"},
        metrics={"val_loss": math.nan, "lr": math.inf},
        curve=[(1, 2.5), (2, math.inf)],
    )
    folder.append(record)
    data = (folder.path / "trials.jsonl").read_bytes()
    assert data.count(b"\n") == 1
    json.loads(data, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (back,) = folder.records()
    assert back.message == "two\nlines\u2028\r\x00 and a file name \\udcff"
    assert [(type(v), v) for v in back.holes.values()] == [(bool, True), (int, 1), (float, 1.0), (str, "1")]
    assert math.isnan(back.metrics["val_loss"])
    assert back.curve == ((1, 2.5), (2, math.inf))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"status": "infeasible"}, "infeasible trials have one"),
        ({"reason": "crash"}, "infeasible trials have one"),
        ({"status": "duplicate"}, "duplicates have one"),
        ({"copy_of": 3}, "duplicates have one"),
        ({"checkpoint": "../../secret"}, "inside the run folder"),
        ({"checkpoint": "/etc/passwd"}, "inside the run folder"),
        ({"objectives": {"val_bpb": {"value": math.nan}}}, "finite"),
        ({"objectives": {"val_bpb": {"value": 1.0, "spread": -1.0}}}, "greater than or equal"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_records_refuse_what_makes_no_sense(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        small(0, **changes)


def test_every_cut_through_the_last_line_loses_only_that_line(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for trial in range(3):
        folder.append(small(trial, message="é" * 5))
    path = folder.path / "trials.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in (*range(second, len(whole) - 1, 7), len(whole) - 2):
        path.write_bytes(whole[:cut])
        assert [r.trial for r in folder.records()] == [0, 1]
        assert path.stat().st_size == cut  # reading mends nothing
        with folder.lock():
            assert path.read_bytes() == whole[:second]
            folder.append(small(7))
        assert [r.trial for r in folder.records()] == [0, 1, 7]


def test_a_record_without_its_newline_is_kept(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.append(small(0))
    path = folder.path / "trials.jsonl"
    path.write_bytes(path.read_bytes().rstrip())
    assert [r.trial for r in folder.records()] == [0]
    folder.append(small(1))
    assert [r.trial for r in folder.records()] == [0, 1]


@pytest.mark.parametrize("line", [b'{"trial": 1, "stat', b"", b'{"trial": 1}', b"\xff\xfe", b"[]"])
def test_a_bad_line_elsewhere_is_named(tmp_path: Path, line: bytes) -> None:
    folder = make(tmp_path)
    folder.append(small(0))
    path = folder.path / "trials.jsonl"
    first = path.read_bytes()
    path.write_bytes(first + line + b"\n" + first)
    with pytest.raises(RunError, match=r"trials\.jsonl:2: not a trial record .*another version"):
        folder.records()
    with folder.lock():  # and is not thrown away
        pass
    assert path.read_bytes() == first + line + b"\n" + first


def test_rungs_are_notes_of_their_own(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert folder.rungs() == []
    for rung in range(3):
        folder.append_rung({"trial": 4, "rung": rung})
    path = folder.path / "rungs.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    assert folder.rungs() == [{"trial": 4, "rung": 0}, {"trial": 4, "rung": 1}]
    folder.append_rung({"trial": 5, "rung": 0})
    assert [note["trial"] for note in folder.rungs()] == [4, 4, 5]
    path.write_bytes(b"{}\n{\n{}\n")
    with pytest.raises(RunError, match=r"rungs\.jsonl was edited"):
        folder.rungs()


FILES = {"one.json": b"[1]", "two.json": b"[2]", "three.json": b"[3]"}


def killed_at(folder: RunFolder, step: int) -> bool:
    """A child replaces FILES and dies at its n-th call that changes the file system; False if it got to its end."""
    child = os.fork()
    if child == 0:
        die_at(step, "mkdir", "fsync", "replace", "rename", "rmdir")
        with folder.lock(), folder.replacing() as new:
            for name, data in FILES.items():
                new.write_bytes(name, data)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_files_replaced_as_one_are_all_old_or_all_new_after_a_kill_at_any_step(tmp_path: Path) -> None:
    seen = []
    step = 0
    while True:
        folder = make(tmp_path / str(step))
        for name in FILES:
            folder.write_bytes(name, b"[0]")
        if not killed_at(folder, step):
            break
        with folder.lock():
            found = {name: (folder.path / name).read_bytes() for name in FILES}
        assert found in (dict.fromkeys(FILES, b"[0]"), FILES), step
        assert not list(folder.path.glob(".repl*"))
        seen.append(found == FILES)
        step += 1
    assert seen == sorted(seen)  # old up to one step, new from it on
    assert 6 < sum(not new for new in seen) < len(seen) - 4


def test_an_error_while_replacing_changes_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path)
    before = sorted(path.name for path in folder.path.iterdir())
    with folder.lock():
        replacing = folder.replacing()
        new = replacing.__enter__()
        new.write_bytes("settings.json", b"{}")
        assert not replacing.__exit__(ValueError, ValueError("stop"), None)
    assert folder.read_json("settings.json") != {}
    assert sorted(path.name for path in folder.path.iterdir()) == sorted({*before, ".lock"})


KILLER = """
    # Forks writers, kills each at a random moment, and checks after each what the folder holds.
    import json, os, random, select, signal, sys, time
    import test_store
    from archsearch.store import RunFolder

    folder, rng = RunFolder(sys.argv[1]), random.Random(7)
    bulk = {"x": "y" * 2_000_000}  # long lines, so that kills land inside a write
    trials, known, torn, left = folder.path / "trials.jsonl", 0, 0, 0
    for round in range(16):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with folder.lock():
                for trial in range(known, known + 1000):
                    folder.append(test_store.small(trial, architecture=bulk))
                    os.write(writer, b"%d " % trial)
                    folder.write_json("front.json", {"trial": trial, **bulk})
            os._exit(0)
        os.close(writer)
        select.select([reader], [], [])  # the first record is there
        if round % 2:
            time.sleep(rng.random() * 0.03)
        else:  # in the middle of a line
            size, until = os.path.getsize(trials) + rng.random() * 2e6, time.monotonic() + 1
            while os.path.getsize(trials) < size and time.monotonic() < until:
                pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = b""
        while part := os.read(reader, 65536):
            said += part
        os.close(reader)
        promised = int(said.split()[-1]) + 1  # appends that returned
        torn += not trials.read_bytes().endswith(b"\\n")
        left += bool(list(folder.path.glob(".front*.tmp")))
        before = time.perf_counter()
        with folder.lock():
            waited = time.perf_counter() - before
            records = folder.records()
            assert not list(folder.path.glob(".*.tmp"))
        assert waited < 5, waited
        assert [r.trial for r in records] == list(range(len(records))), round
        assert promised <= len(records) <= promised + 1, (round, promised, len(records))
        assert folder.read_json("front.json")["trial"] < len(records)
        folder.write_json("front.json", {"trial": -1})
        trials.write_bytes(b"".join(r.to_line() for r in records[:2]))
        known = len(records[:2])
    print(json.dumps({"torn": torn, "left": left}))
"""


def test_kill_9_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.write_json("front.json", {"trial": -1})
    killer = run_python(KILLER, folder.path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    out, _ = killer.communicate(timeout=240)
    assert killer.returncode == 0
    seen = json.loads(out)
    assert seen["torn"] + seen["left"] > 0  # else every kill came at a harmless moment and nothing was tested


HOLDER = """
    import subprocess, sys, time
    from archsearch.store import RunFolder
    with RunFolder(sys.argv[1]).lock():
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(worker.pid, flush=True)
        time.sleep(60)
"""


def test_the_second_launch_is_refused_and_kill_9_frees_the_lock(tmp_path: Path) -> None:
    folder = make(tmp_path)
    holder = run_python(HOLDER, folder.path)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        with (
            pytest.raises(RunError, match=rf"in use by process {holder.pid} .*kill {holder.pid}.*resume"),
            folder.lock(),
        ):
            pass
        with pytest.raises(RunError, match=f"process {holder.pid}"):
            folder.append(small(0))
        assert folder.records() == []  # reading needs no lock
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # its worker is alive and does not hold the lock
        folder.append(small(0))
        assert [r.trial for r in folder.records()] == [0]
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_the_lock_is_free_after_use_and_after_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with pytest.raises(KeyError), folder.lock():
        raise KeyError
    with folder.lock(), pytest.raises(RunError, match=f"process {os.getpid()} "), RunFolder(folder.path).lock():
        pass
    with folder.lock():
        pass
    with folder.lock():
        (folder.path / ".lock").write_text("not json")
        with pytest.raises(RunError, match="in use by another process; wait"), RunFolder(folder.path).lock():
            pass


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path)
    folder.append(small(0))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
        with pytest.raises(RunError, match=r"/trials\.jsonl: No space left on device; make room there and give the"):
            folder.append(small(1))
    folder.append(small(2))
    assert [r.trial for r in folder.records()] == [0, 2]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path)
    folder.write_json("front.json", {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(RunError, match="No space left"):
            folder.write_json("front.json", {"new": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("front.json", {"new": math.nan})
    assert folder.read_json("front.json") == {"old": 1}
    assert not list(folder.path.glob(".*.tmp"))


def test_create_makes_a_run_once_and_finishes_an_interrupted_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "toy")
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (folder.path / "space.yaml").write_text("half")
    assert not folder.exists
    parts: dict[str, Any] = {
        "space_yaml": "a: 1 # é\n",
        "space": {"a": 1},
        "settings": {"name": "toy"},
        "environment": {},
    }
    folder.create(**parts)
    assert folder.exists
    assert (folder.path / "space.yaml").read_text() == "a: 1 # é\n"
    assert folder.read_json("settings.json") == {"name": "toy"}
    assert (folder.path / "checkpoints").is_dir()
    assert folder.records() == []
    with pytest.raises(RunError, match="holds a run already"):
        folder.create(**parts)


def test_open_names_the_nearest_run(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(RunError, match=r"tyo is not a run folder\. Runs in .*: toy\. Did you mean 'toy'\?"):
        RunFolder.open(tmp_path / "runs" / "tyo")
    with pytest.raises(RunError, match=r"There is no run in '.*nowhere' either"):
        RunFolder.open(tmp_path / "nowhere" / "toy")


def test_a_path_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("")
    for path, way in (("toy", f"move it (mv {tmp_path}/toy {tmp_path}/toy.old), or"), ("toy/run", "name a folder")):
        told = f"{tmp_path}/toy is a file, and the run folder is to be {tmp_path / path}: {way} "
        with pytest.raises(RunError, match=re.escape(told)), RunFolder(tmp_path / path).lock():
            pass


def test_what_killed_workers_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = make(tmp_path)
    kept = folder.path / "checkpoints" / "3.safetensors"
    for path in (kept, kept.with_name(".3.safetensors.77.tmp"), kept.with_name(".tmpX1yZ")):
        path.write_text("")
    with folder.lock():
        assert list(kept.parent.iterdir()) == [kept]


def test_files_stay_inside_the_folder(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert folder.inside("checkpoints/3.safetensors") == folder.path / "checkpoints" / "3.safetensors"
    for name in ("../x", "/etc/passwd", "checkpoints/../../x"):
        with pytest.raises(RunError, match="leads out of"):
            folder.inside(name)
    with pytest.raises(RunError, match=r"front\.json.*No such file"):
        folder.read_json("front.json")
    (folder.path / "front.json").write_text("{")
    with pytest.raises(RunError, match="is not JSON"):
        folder.read_json("front.json")


def test_environment_says_where_and_with_what(tmp_path: Path) -> None:
    found = environment(gpu="Some GPU", corpus_sha256="ab", repository=tmp_path)
    assert found["gpu"] == "Some GPU"
    assert found["corpus_sha256"] == "ab"
    assert found["git"] is None
    assert found["cpu"]["cores"] >= 1
    assert set(found["packages"]) >= {"archsearch", "optuna", "pydantic"}
    json.dumps(found, allow_nan=False)


def test_environment_reads_git(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, "-C", tmp_path, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    assert environment(repository=tmp_path)["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert environment(repository=tmp_path)["git"]["dirty"] is True


def test_the_store_is_light() -> None:
    """Commands that only read a run folder start at once."""
    heavy = ["numpy", "torch", "optuna", "matplotlib", "networkx", "rich", "yaml"]
    check = f"import sys, archsearch.store; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(check).communicate(timeout=60)[0].strip() == "[]"
