"""What the timing process does with a job, and in which order, on a device of the test's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_kernels import CONFIGS, demo_scale, double
from kernel_checks import DEVICE
from tuner_process import CARD, Timer, make_up

from archsearch_kernels import launch
from archsearch_kernels.launch import recording
from archsearch_kernels.tuner import lookup, search, worker
from archsearch_kernels.tuner.compile import Resources
from archsearch_kernels.tuner.identity import Compiler
from archsearch_kernels.tuner.store import Row, Table, frozen
from archsearch_kernels.tuner.workload import Job

JOB: dict[str, Any] = {
    "maker": "demo_kernels:demo_workload",
    "arguments": {"lengths": [1000, 100]},
    "limit": 6,
    "seconds": None,
}
ROW = Row("demo", "demo_scale", "c", CARD, Compiler("3.6.0", "12"), ("float32",), (), (), (), "slow")
VERDICTS = ("slow", "crash", "untimed", "wrong")


class Session:
    """Notes what it is told, in order, and compiles everything at once."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.waited = 0.0

    def say(self, kind: str, **data: Any) -> None:
        self.heard.append((kind, json.loads(json.dumps(data))))

    def compile(self, requests: Sequence[dict[str, Any]]) -> list[Resources]:
        self.say("compile", requests=requests)
        return [Resources(registers=40, shared=1024) for _ in requests]

    def hurry(self, requests: Sequence[dict[str, Any]]) -> None:
        self.say("hurry", requests=requests)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.heard if kind != "begin"]

    def rows(self) -> list[Row]:
        return [Row.from_json(json.dumps(data["row"])) for kind, data in self.heard if kind == "row"]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    make_up(monkeypatch.setattr)
    demo_scale.forget()
    return Session()


def serve(session: Session, **options: Any) -> None:
    worker._serve({**JOB, **options}, session, session.say)  # type: ignore[arg-type]


def test_all_launches_are_timed_before_the_first_is_checked(session: Session) -> None:
    serve(session)
    timed, checked = ["compile", "row", "row", "row", "hurry"], ["compile", "together", "together"]
    assert session.kinds() == [*timed, *timed, *checked, *["row", "tuned"] * 2, "done"]
    won = [row for row in session.rows() if row.verdict == "ok"]
    assert [dict(row.bucket)["T"] for row in won] == [1024, 128]  # dearest first
    assert {row.config for row in won} == {frozen(CONFIGS[1])}


def test_the_compiler_is_told_what_the_check_will_run(session: Session) -> None:
    serve(session)
    (told, _) = [data["requests"] for kind, data in session.heard if kind == "hurry"]
    asked = [data["requests"] for kind, data in session.heard if kind == "compile"]
    assert [(x["config"], x["arguments"]["T"], x["read_code"]) for x in told] == [
        (CONFIGS[1], 17, False),  # 37 rows
        (CONFIGS[1], 17, True),  # 1000 rows, whose code is looked through before it may win
    ]
    assert [len(requests) for requests in asked] == [4, 4, 2]
    assert asked[2][0] == told[1]


def test_a_configuration_with_lost_registers_may_not_win(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(requests: Sequence[dict[str, Any]]) -> list[Resources]:
        lost = "ptxas lost a register"
        return [Resources(40, 0, 1024, lost if x["read_code"] and x["config"]["BM"] == 32 else None) for x in requests]

    monkeypatch.setattr(session, "compile", compile)
    serve(session)
    verdicts = {(dict(row.config)["BM"], row.verdict, row.note) for row in session.rows() if row.verdict != "slow"}
    assert (32, "resources", "ptxas lost a register") in verdicts
    assert {bm for bm, verdict, _ in verdicts if verdict == "ok"} <= {16, 64}
    assert any(verdict == "ok" for _, verdict, _ in verdicts)


def checks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is forced in each judgement from here on."""
    made: list[dict[str, Any]] = []
    judge = search._judge

    def judged(*args: Any) -> Any:
        made.append(dict(launch._forced))
        return judge(*args)

    monkeypatch.setattr(search, "_judge", judged)
    return made


def test_winners_are_checked_at_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checks(monkeypatch)
    serve(session)
    assert made == [{}, {"demo_scale": CONFIGS[1]}]  # the workload as it is; both launches, with one configuration
    assert all(row.error is not None for row in session.rows() if row.verdict == "ok")


def test_one_that_is_wrong_is_found_by_itself(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer input is fastest in a configuration that is wrong, the shorter one in another."""
    times = Timer.times

    def wrong_is_fast(self: Timer, x: launch.Launch, config: launch.Config, n: int) -> list[float]:
        return [0.1] * n if config["OFF"] and x.arguments["T"] == 1000 else times(self, x, config, n)

    monkeypatch.setattr(Timer, "times", wrong_is_fast)
    made = checks(monkeypatch)
    serve(session)
    forced = [found.get("demo_scale") for found in made]
    assert forced == [None, CONFIGS[3], CONFIGS[1], CONFIGS[3], CONFIGS[1]]  # two rounds, then the wrong one's search
    rows = {(dict(row.bucket)["T"], row.config): row.verdict for row in session.rows()}
    assert rows[1024, frozen(CONFIGS[3])] == "wrong"
    assert rows[1024, frozen(CONFIGS[1])] == rows[128, frozen(CONFIGS[1])] == "ok"


def test_what_another_job_has_found_out_is_left_alone(session: Session) -> None:
    """Though this process has looked the tables up before, and runs in what it found then."""
    serve(session)
    Table.open(lookup.user_table(CARD)).append(session.rows())
    session.heard.clear()
    serve(session)
    assert session.kinds() == ["done"]


def test_a_flag_that_is_none_comes_back_from_the_table(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"T": 4}
    x = torch.ones(4, 64)
    key = demo_scale.key({"x": x, "y": x, "T": 4, "D": None}, sizes)
    assert key.flags == (("D", None),)
    assert demo_scale.key({"x": x, "y": None, "T": 4, "D": 64}, sizes).flags == (("D", 64), ("y", None))
    row = replace(ROW, flags=key.flags)
    assert Row.from_json(row.to_json()).flags == key.flags


def test_a_job_that_was_prepared_is_not_made_again(session: Session) -> None:
    prepared = worker._prepare(JOB)
    assert prepared is not None
    assert prepared[0] == Job(JOB["maker"], JOB["arguments"])
    serve_prepared = Job.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "make", lambda self: pytest.fail("made again"))
        worker._serve(JOB, session, session.say, prepared[1])  # type: ignore[arg-type]
    assert Job.make is serve_prepared
    assert session.kinds()[-1] == "done"
    assert worker._prepare({**JOB, "arguments": {"lengths": None}}) is None  # it is reported when its turn comes


def test_what_nobody_found_right_stays_open() -> None:
    with recording() as made:
        double(torch.ones(4, 64, device=DEVICE))
    rows = {frozen(c): replace(ROW, config=frozen(c), verdict=v) for c, v in zip(CONFIGS, VERDICTS, strict=True)}
    assert search.open_candidates(made[0], rows, search.QUICK) == [CONFIGS[0], CONFIGS[2]]
    rows[frozen(CONFIGS[3])] = replace(ROW, verdict="ok")
    assert search.open_candidates(made[0], rows, search.QUICK) == []


def test_what_a_table_knows_is_left_alone(session: Session) -> None:
    serve(session)
    table = Table.open(lookup.user_table(CARD))
    table.append(session.rows())
    lookup.refresh()
    session.heard.clear()
    serve(session)
    assert session.kinds() == ["done"]


def test_the_time_is_kept(session: Session) -> None:
    serve(session, seconds=0.0)
    assert session.heard[-1] == ("done", {"left": 2})
    assert session.rows() == []
