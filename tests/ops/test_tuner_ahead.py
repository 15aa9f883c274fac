"""Compiling ahead: every job is given out once, whoever dies; the time that is given is kept."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from demo_kernels import CONFIGS, double
from kernel_checks import randn

from archsearch_kernels.launch import recording
from archsearch_kernels.tuner import ahead
from archsearch_kernels.tuner.compile import CompilePool, Resources, claim, keep, kept, request
from archsearch_kernels.tuner.workload import Job

HELPER = """
import json, os, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    plan = asked["arguments"]
    with open(plan["log"], "a") as log:
        log.write(json.dumps([plan["i"], sys.argv[1], asked["limit"]]) + chr(10))
    if plan["i"] == 1:
        os._exit(1)
    time.sleep(plan.get("seconds", 0))
    print("{}", flush=True)
"""


def given(log: Path) -> list[int]:
    return sorted(json.loads(line)[0] for line in log.read_text().splitlines())


def test_every_job_is_given_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid: set(range(4)))
    log = tmp_path / "log"
    jobs = [Job("m:f", {"i": i, "log": str(log)}) for i in range(5)]
    ahead.compile_ahead(jobs, tmp_path, 6, None, [sys.executable, "-c", HELPER])
    assert given(log) == [0, 1, 2, 3, 4]
    assert {tuple(json.loads(line)[1:]) for line in log.read_text().splitlines()} == {("2", 6)}


def test_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid: set(range(4)))
    log = tmp_path / "log"
    jobs = [Job("m:f", {"i": 2, "log": str(log), "seconds": 60}) for _ in range(9)]
    began = time.monotonic()
    ahead.compile_ahead(jobs, tmp_path, 6, 1.0, [sys.executable, "-c", HELPER])
    assert time.monotonic() - began < 20
    assert len(given(log)) <= 2


def test_a_candidate_is_claimed_once_and_its_answer_kept(tmp_path: Path) -> None:
    with recording() as made:
        double(randn(100, 64))
    asks = [request(made[0], config) for config in CONFIGS]
    assert [claim(tmp_path, asking) for asking in (*asks, *asks)] == [True] * len(asks) + [False] * len(asks)
    assert kept(tmp_path, asks[0]) is None  # still being compiled
    answer = Resources(40, 8, 1024, "late")
    keep(tmp_path, asks[0], answer)
    assert kept(tmp_path, asks[0]) == answer
    with CompilePool(1) as pool:
        pool.answers = tmp_path
        assert pool.compile([asks[0]]) == [answer]
    assert kept(None, asks[0]) is None
