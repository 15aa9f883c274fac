"""A timing process that dies or hangs costs one configuration; rows are kept as they come; the budget is kept."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tuner_process
from demo_kernels import CONFIGS
from tuner_process import CARD

from archsearch_kernels.tuner import finished, lookup, search, session
from archsearch_kernels.tuner.finished import Finished, source_digest
from archsearch_kernels.tuner.identity import Compiler
from archsearch_kernels.tuner.store import Row, Table, frozen
from archsearch_kernels.tuner.workload import Job

ROW = Row("demo", "demo_scale", "c", CARD, Compiler("3.6.0", "12"), ("float32",), (), (), frozen(CONFIGS[0]), "crash")

# Answers by the job's name: how many configurations it tries, and at which it dies or hangs unless it is known.
WORKER = """
import json, os, sys, time
table = sys.argv[1]
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("prepare"):
        continue
    plan = asked["arguments"]
    say = lambda kind, **data: print(json.dumps({"kind": kind, **data}), flush=True)
    known = open(table).read() if os.path.exists(table) else ""
    for i in range(plan["n"]):
        row = dict(plan["row"], config={"BM": i})
        if '"config": {"BM": %d}' % i in known:
            continue
        say("begin", row=row)
        if i == plan.get("dies"):
            print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
            os._exit(1)
        if i == plan.get("hangs"):
            time.sleep(100)
        say("row", row=dict(row, verdict="ok", median_us=1.0 + i))
    if plan.get("together") and asked["together"]:
        say("together", on=True)
        os._exit(1)
    left = plan.get("left", 0)
    if plan.get("later"):  # it gets on by one launch each time
        left -= known.count('"turn"')
        say("row", row=dict(plan["row"], config={"turn": left}))
    say("tuned", kernel="demo_scale", seconds=0.1, device_seconds=0.02)
    say("done", left=left)
"""


RECORDER = [sys.executable, "-c", 'import sys\nfor line in sys.stdin: print(\'{"problem": "no"}\', flush=True)']


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session, "device", lambda: CARD)
    monkeypatch.setattr(finished, "compiler", lambda: Compiler("3.6.0", "12"))
    monkeypatch.setattr(session, "HANG_SECONDS", 1.5)
    return lookup.user_table(CARD)


def run(table: Path, *plans: dict[str, int], budget: float | None = None) -> tuple[session.Summary, dict[int, Row]]:
    jobs = [Job("m:f", {**plan, "row": json.loads(ROW.to_json())}, f"job {i}") for i, plan in enumerate(plans)]
    said: list[str] = []
    command = [sys.executable, "-c", WORKER, str(table)]
    summary = session.tune_jobs(jobs, budget=budget, say=said.append, command=command, recorder=RECORDER)
    return summary, {dict(row.config)["BM"]: row for row in Table.open(table).rows.values()}


def test_all_rows_are_kept(table: Path) -> None:
    summary, rows = run(table, {"n": 3}, {"n": 5})
    assert (summary.tuned, summary.left, summary.failures) == (2, 0, [])
    assert [rows[i].median_us for i in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_death_costs_one_configuration(table: Path) -> None:
    summary, rows = run(table, {"n": 4, "dies": 1}, {"n": 5})
    assert summary.tuned == 2
    assert [rows[i].verdict for i in range(5)] == ["ok", "crash", "ok", "ok", "ok"]
    assert "illegal memory access" in rows[1].note


def test_a_hang_costs_one_configuration(table: Path) -> None:
    summary, rows = run(table, {"n": 3, "hangs": 0})
    assert summary.tuned == 1
    assert [rows[i].verdict for i in range(3)] == ["timeout", "ok", "ok"]


def test_a_workload_that_cannot_be_made_is_a_failure_of_its_own(table: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit('no such mixer')"]
    summary = session.tune_jobs([Job("m:f", {}, "odd")], command=command, recorder=RECORDER)
    assert summary.failures == ["odd: the timing process died: no such mixer"]


def test_the_budget_ends_it(table: Path) -> None:
    summary, _ = run(table, {"n": 1, "left": 7}, {"n": 1}, budget=1e-9)
    assert (summary.tuned, summary.left) == (0, 2)
    summary, _ = run(table, {"n": 1, "left": 7}, budget=60)
    assert summary.left == 7


def test_what_was_cut_short_is_gone_on_with(table: Path) -> None:
    jobs = [Job("m:f", {"n": n, "left": 2, "later": True, "row": json.loads(ROW.to_json())}, "x") for n in (0,)]
    command = [sys.executable, "-c", WORKER, str(table)]
    summary = session.tune_jobs(jobs, budget=60, command=command, recorder=RECORDER)
    assert (summary.tuned, summary.left, summary.failures) == (3, 0, [])


def test_a_death_in_a_check_of_many_blames_nobody(table: Path) -> None:
    summary, rows = run(table, {"n": 2, "together": 1}, {"n": 3})
    assert (summary.tuned, summary.left, summary.failures) == (2, 0, [])
    assert [rows[i].verdict for i in range(3)] == ["ok"] * 3


def test_from_end_to_end(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded and timed in processes of their own, compiled for Hopper; the second session finds nothing to do."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(session, "HANG_SECONDS", 60.0)
    monkeypatch.syspath_prepend(str(Path(tuner_process.__file__).parent))
    recorder, timing = ([sys.executable, tuner_process.__file__, what] for what in ("record", "time"))
    jobs = [Job("demo_kernels:demo_workload", {"lengths": [1000, 100]}, "demo")]
    said: list[str] = []
    summary = session.tune_jobs(jobs, say=said.append, command=timing, recorder=recorder)
    assert (summary.failures, summary.tuned, summary.left) == ([], 2, 0)
    assert [line.partition(" in ")[0] for line in said] == ["demo: demo_scale"] * 2
    rows = Table.open(table).rows.values()
    assert {(dict(row.bucket)["T"], row.config) for row in rows if row.verdict == "ok"} == {
        (T, frozen(CONFIGS[1])) for T in (128, 1024)
    }
    assert all(row.registers for row in rows)
    again = session.tune_jobs(jobs, command=[sys.executable, "-c", "raise SystemExit('not asked')"], recorder=recorder)
    assert (again.failures, again.tuned, again.rows) == ([], 0, 0)


def test_without_a_device_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(RuntimeError, match="tuning needs a CUDA device"):
        session.tune_jobs([])


def test_a_finished_job_is_not_looked_into_again(table: Path) -> None:
    job = Job("m:f", {"n": 1, "row": json.loads(ROW.to_json())}, "x", "code")
    commands: dict[str, list[str]] = {"command": [sys.executable, "-c", WORKER, str(table)], "recorder": RECORDER}
    nobody: dict[str, list[str]] = {"command": ["/none"], "recorder": ["/none"]}
    assert session.tune_jobs([job], **commands).tuned == 1
    assert session.tune_jobs([job], **nobody) == session.Summary()
    with pytest.raises(FileNotFoundError):  # the code has changed
        session.tune_jobs([replace(job, code="other")], **nobody)
    with pytest.raises(FileNotFoundError):  # more candidates are to be timed
        session.tune_jobs([job], limit=64, **nobody)
    with pytest.raises(FileNotFoundError):  # of what is unknown there is no telling
        session.tune_jobs([replace(job, code="")], **nobody)
    table.unlink()
    with pytest.raises(FileNotFoundError):
        session.tune_jobs([job], **nobody)


def test_a_job_that_is_not_finished_is_looked_into_again(table: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(table)]
    for plan in ({"n": 1, "left": 7}, {"n": 0, "dies": 0}):
        job = Job("m:f", {**plan, "row": json.loads(ROW.to_json())}, "x", "code")
        session.tune_jobs([job], command=command, recorder=RECORDER)
        assert (job in Finished(table, search.QUICK)) is ("left" not in plan)


def test_any_change_of_our_code_counts(tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    digests = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("tuned/x.json", "{}"), ("b.py", "")):
        (tmp_path / name).write_text(text)
        source_digest.cache_clear()
        digests.add(source_digest(tmp_path))
    (tmp_path / "notes.txt").write_text("no code")
    source_digest.cache_clear()
    digests.add(source_digest(tmp_path))
    assert len(digests) == 4
