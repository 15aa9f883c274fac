"""Compiling ahead: every job is recorded once, whoever dies; the time that is given is kept; nothing compiles twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_kernels import CONFIGS, demo_scale, double
from kernel_checks import DEVICE, randn
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from tuner_process import make_up

from archsearch_kernels.launch import Launch, recording
from archsearch_kernels.tuner import ahead
from archsearch_kernels.tuner import compile as compiling
from archsearch_kernels.tuner.compile import CompilePool, Resources, request
from archsearch_kernels.tuner.workload import Job

# A recorder that dies of job 1 and takes the seconds that it is told.
RECORDER = """
import json, os, sys, time
for line in sys.stdin:
    plan = json.loads(line)["arguments"]
    with open(plan["log"], "a") as log:
        log.write(str(plan["i"]) + chr(10))
    if plan["i"] == 1:
        os._exit(1)
    time.sleep(plan.get("seconds", 0))
    i = plan["i"]
    found = {"problem": "", "is_open": i != 3, "used": [{"i": i}], "candidates": [{"i": i, "c": 0}], "checked": []}
    print(json.dumps({"problem": "no"} if i == 4 else found), flush=True)
"""
COMMAND = [sys.executable, "-c", RECORDER]


class Pool:
    """Takes note of what it is asked."""

    def __init__(self) -> None:
        self.ranks: dict[str, int] = {}

    def submit(self, requests: Sequence[Mapping[str, Any]], rank: int = 0) -> list[Future[Resources]]:
        self.ranks |= {json.dumps(asked): rank for asked in requests}
        answers: list[Future[Resources]] = [Future() for _ in requests]
        for answer in answers:
            answer.set_result(Resources())
        return answers


@pytest.fixture
def planner(tmp_path: Path) -> Iterator[Callable[..., ahead.Planner]]:
    """Makes planners of jobs; jobs that are given out are noted in tmp_path / "log"."""
    made: list[ahead.Planner] = []

    def make(*plans: dict[str, int]) -> ahead.Planner:
        jobs = [Job("m:f", {**plan, "log": str(tmp_path / "log")}) for plan in plans]
        made.append(ahead.Planner(jobs, Pool(), 6, COMMAND))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_every_job_is_recorded_once(planner: Callable[..., ahead.Planner], tmp_path: Path) -> None:
    all_jobs = planner(*({"i": i} for i in range(5)))
    all_jobs.plan_all(None)
    plans = [all_jobs.plan(i, None) for i in range(5)]
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "3", "4"]
    assert [plan.is_open for plan in plans] == [True, None, True, False, None]
    assert [len(plan.used) for plan in plans] == [1, 0, 1, 1, 0]
    ranks = list(all_jobs.pool.ranks.items())  # type: ignore[attr-defined]
    assert [name for name, _ in sorted(ranks, key=lambda pair: pair[1])] == [
        json.dumps(asked) for i in (0, 2, 3) for asked in ({"i": i}, {"i": i, "c": 0})
    ]


def test_the_time_is_kept(planner: Callable[..., ahead.Planner], tmp_path: Path) -> None:
    slow = planner(*[{"i": 2, "seconds": 60}] * 9)
    began = time.monotonic()
    slow.plan_all(1.0)
    assert time.monotonic() - began < 20
    assert slow.plans == {}
    assert not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().split()) <= 1


def test_what_there_was_no_time_for_is_recorded_when_its_turn_comes(planner: Callable[..., ahead.Planner]) -> None:
    late = planner({"i": 2}, {"i": 3})
    late.plan_all(0.0)
    assert late.plans == {}
    assert [late.plan(i, None).is_open for i in range(2)] == [True, False]


def made(x: torch.Tensor) -> Launch:
    with recording() as launches:
        double(x)
    return launches[0]


def test_a_dry_recording_makes_no_launch() -> None:
    x = randn(40, 64)
    at = torch.ones(3, dtype=torch.int64, device=DEVICE)
    with recording() as outer, recording(dry=True) as launches:
        y = double(x)
        demo_scale.launch(lambda c: (1,), {"x": at, "y": y, "T": 1, "D": 64}, sizes={"T": 1})
    assert [launch.key.bucket for launch in launches] == [(("T", 64),), (("T", 1),)]
    assert len(outer) == 2
    assert at.tolist() == [0, 0, 0]
    y.zero_()
    launches[0].run(CONFIGS[0])  # it can be made later
    assert torch.equal(y, 2 * x)
    assert torch.equal(double(x), 2 * x)


def test_launches_of_one_code_give_one_request() -> None:
    launch = made(randn(100, 64))
    target = GPUTarget("cuda", 90, 32)
    jitted = JITFunction(demo_scale.python)
    bind = create_function_from_signature(jitted.signature, jitted.params, make_backend(target))
    values = [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31) - 1, 2**40, 1.0, 2.5, None, True]
    by_request: dict[str, set[str]] = {}
    for value in values:
        given = {**launch.arguments, "T": value}
        asked = request(Launch(launch.kernel, launch.grid, given, launch.key), CONFIGS[0])
        told_apart = [str(part) for part in bind(**given, **CONFIGS[0])[1]]
        again = [str(part) for part in bind(**{**given, "T": asked["arguments"]["T"]}, **CONFIGS[0])[1]]
        assert told_apart == again, value
        by_request.setdefault(json.dumps(asked), set()).add(str(told_apart))
    assert all(len(found) == 1 for found in by_request.values())
    assert len(by_request) == 8
    flag = Launch(launch.kernel, launch.grid, {**launch.arguments, "D": 128}, launch.key)
    assert request(flag, CONFIGS[0]) != request(launch, CONFIGS[0])


def test_what_is_asked_twice_is_compiled_once_and_the_urgent_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    class Process:
        """A compiler that notes what it gets; the first request takes its time."""

        returncode = None

        def __init__(self) -> None:
            self.process = self

        def compile(self, asked: dict[str, Any]) -> Resources:
            if not order:
                time.sleep(0.5)
            order.append(asked["i"])
            return Resources(registers=asked["i"])

        def close(self) -> None: ...

        def kill(self) -> None: ...

    monkeypatch.setattr(compiling, "_Process", Process)
    with CompilePool(1) as pool:
        pool.submit([{"i": 0}], rank=9)
        time.sleep(0.2)
        slow = pool.submit([{"i": 1}, {"i": 2}, {"i": 3}], rank=5)
        fast = pool.submit([{"i": 3}, {"i": 4}], rank=1)
        assert [answer.result().registers for answer in [*slow, *fast]] == [1, 2, 3, 3, 4]
        assert slow[2] is fast[0]
        assert pool.compile([{"i": 2}]) == [Resources(registers=2)]
    assert order == [0, 3, 4, 1, 2]


def test_a_pool_that_closes_leaves_nobody_waiting() -> None:
    with CompilePool(1) as pool:
        answers = pool.submit([{"i": i} for i in range(3)])
    assert all(answer.done() for answer in answers)


def test_a_job_is_recorded_with_what_its_check_will_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    make_up(monkeypatch.setattr)
    found = ahead.record(Job("demo_kernels:demo_workload", {"lengths": [100]}), 6)
    assert found["is_open"]
    assert [asked["config"] for asked in found["candidates"]] == CONFIGS
    assert [asked["config"] for asked in found["checked"]] == CONFIGS
    assert [asked["config"] for asked in found["used"]] == [CONFIGS[0]]
    sizes = [asked["arguments"]["T"] for asked in (found["candidates"][0], found["checked"][0])]
    assert sizes == [17, 17]  # 100 and 37, which are one code


ORDERS = """
from archsearch_kernels.delta_rule.kernels.backward import delta_rule_gradients
from archsearch_kernels.delta_rule.kernels.forward import delta_rule_pairs
from archsearch_kernels.short_conv.kernels import short_conv_backward, short_conv_forward
from archsearch_kernels.launch import KERNELS
from triton.runtime.jit import JITCallable
import sys

kernels = [short_conv_forward, short_conv_backward, delta_rule_pairs, delta_rule_gradients]
modules = [m for name, m in sys.modules.items() if name.startswith("archsearch_kernels")]
jitted = [x for m in modules for x in vars(m).values() if isinstance(x, JITCallable)] + [k.fn for k in kernels]


def keys(order):
    for x in jitted:
        x.hash, x.used_global_vals = None, {}
    for k in order:
        k._settled = False
        k.settle()
    return [k.fn.cache_key for k in kernels]


assert keys(kernels) == keys(kernels[::-1])
"""


def test_the_order_of_compilation_does_not_change_what_is_found_in_the_cache() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", ORDERS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
