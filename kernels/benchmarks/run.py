"""Times every operation beside its peers and its floor in one run on a GPU, and writes the table of kernels/README.md.

    python kernels/benchmarks/run.py [OP ...] [--tune off|cached|quick|full] [--exhaustive] [--budget SECONDS]

An operation whose outputs or gradients differ from its reference is refused. Medians; the L2 is cold at each run. Time
is the device's: forward, and forward with backward, are replayed as CUDA graphs where they can be captured, ours and
the peers' alike. What a call from Python takes besides is its own column.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from case import Case, results, step
from table import line, write_table

from archsearch_kernels.capture import renew_generator
from archsearch_kernels.launch import recording
from archsearch_kernels.tuner import lookup, search
from archsearch_kernels.tuner.identity import compiler, device
from archsearch_kernels.tuner.session import tune_jobs
from archsearch_kernels.tuner.workload import Job, distance

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CHECKERS = 12  # processes


@dataclass
class Numbers:
    """Milliseconds of one implementation: forward, forward and backward; seconds of its first call.

    eager: milliseconds of the last of these when called from Python. graphed: whether the others are of CUDA graphs.
    """

    forward: float | None = None
    both: float | None = None
    cold_s: float | None = None
    eager: float | None = None
    graphed: bool = False
    note: str = ""


def main() -> None:
    """Check, tune, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="operations, parts of names, or numbers of --list")
    parser.add_argument("--list", action="store_true", help="print the cases with their numbers")
    parser.add_argument("--tune", default="quick", choices=["off", "cached", "quick", "full"])
    parser.add_argument("--budget", type=float, help="seconds for tuning")
    parser.add_argument("--exhaustive", action="store_true", help="hold the search against timing every candidate")
    parser.add_argument("--skip", default=None, metavar="TEXT", help="leave out peers whose name begins so (all: '')")
    parser.add_argument("--out", type=Path, help="results file (default: results/<gpu>.json)")
    parser.add_argument("--check", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["ARCHSEARCH_TUNE"] = args.tune
    cases = load(args.ops)
    if args.list:
        print("\n".join(f"{i:3d} {case.name}" for i, (_, _, case) in enumerate(cases)))
        return
    ceilings = {} if args.check else measure_ceilings()
    if args.check:
        print(json.dumps({c.name: refuse(c) for _, _, c in cases[args.check - 1 :: CHECKERS]}))
        return
    print(f"{device().name}, torch {torch.__version__}, triton {compiler().triton}, ptxas {compiler().ptxas}")
    print(f"copy {ceilings['bytes'] / 1e12:.2f} TB/s, bf16 matmul {ceilings['flops'] / 1e12:.0f} TFLOP/s", flush=True)
    refused = refusals(args.ops)
    for name, why in refused.items():
        print(f"REFUSED {name}: {why}", flush=True)
    cases = [x for x in cases if x[2].name not in refused]
    tuning = None
    if args.tune in ("quick", "full"):
        jobs = [Job("case:workload", {"module": m, "index": i}, c.name) for m, i, c in cases]
        limit = search.QUICK if args.tune == "quick" else search.FULL
        tuning = tune_jobs(jobs, budget=args.budget, limit=limit, say=lambda text: print(f"  {text}", flush=True))
        print(f"tuning: {tuning.tuned} launches, {tuning.rows} rows, {tuning.left} left, {tuning.seconds:.0f} s")
        print(f"tuning: candidates ran for {tuning.device_seconds:.1f} s")
        for failure in tuning.failures:
            print(f"  FAILED {failure}")
    path = args.out or RESULTS / f"{device().slug}.json"
    rows = []
    for _, _, case in cases:
        rows.append(measure(case, ceilings, args.skip, args.exhaustive))
        print(line(rows[-1]), flush=True)
        write(path, rows, refused, ceilings, tuning)
        torch.cuda.empty_cache()
    print(f"written: {path.name}")
    if path.parent == RESULTS:
        write_table(HERE.parent / "README.md", RESULTS)


def load(wanted: list[str]) -> list[tuple[str, int, Case]]:
    """The cases that are asked for, as (module, index, case)."""
    found = []
    for path in sorted((HERE / "cases").glob("*.py")):
        module = f"cases.{path.stem}"
        for i, case in enumerate(importlib.import_module(module).CASES):
            found.append((module, i, case))
    numbers = {int(w) for w in wanted if w.isdigit()}
    names = [w for w in wanted if not w.isdigit()]

    def is_wanted(number: int, case: Case) -> bool:
        return not wanted or number in numbers or any(name in case.name for name in names)

    return [x for number, x in enumerate(found) if is_wanted(number, x[2])]


def measure_ceilings() -> dict[str, float]:
    """Bytes a second of a large copy (read and written counted) and FLOP/s of a large bf16 product."""
    a = torch.empty(2**29, dtype=torch.int32, device="cuda").random_()
    b = torch.empty_like(a)
    copied = 2 * a.nbytes / (1e-3 * median_ms(functools.partial(b.copy_, a)))
    del a, b  # four gigabytes
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"bytes": copied, "flops": 2 * 8192**3 / (1e-3 * median_ms(functools.partial(torch.mm, x, y)))}


def median_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of a call on the device."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=20, rep=80, return_mode="median"))


def refusals(ops: list[str]) -> dict[str, str]:
    """Why cases are not timed, by name. Several processes check: compiling takes most of the time, and one that an
    illegal access ends takes only its own cases along."""
    command = [sys.executable, __file__, *ops, "--tune", "off", "--check"]
    checkers = [subprocess.Popen([*command, str(n + 1)], stdout=subprocess.PIPE, text=True) for n in range(CHECKERS)]
    found: dict[str, str | None] = {}
    for checker in checkers:
        said = checker.communicate()[0].strip().splitlines()
        found |= json.loads(said[-1]) if checker.returncode == 0 and said else {}
    names = [case.name for _, _, case in load(ops)]
    lost = {name: "the process that checked it died" for name in names if name not in found}
    return {name: why for name, why in (found | lost).items() if why is not None}


def refuse(case: Case) -> str | None:
    """Why a case is not timed: an error, or what differs from the reference."""
    torch.manual_seed(0)
    try:
        small = case.small()
        got, expected = results(case, case.run, small), results(case, case.reference, small)
        errors = {name: distance(got[name], value) for name, value in expected.items()}
    except Exception as problem:  # a benchmark of many operations goes on with the others
        torch.cuda.synchronize()
        return f"{type(problem).__name__}: {str(problem)[:300]}"
    wrong = {name: round(e, 5) for name, e in errors.items() if e > case.tolerance}
    return f"differs from the reference: {wrong}" if wrong else None


def measure(case: Case, ceilings: dict[str, float], skip: str | None, exhaustive: bool) -> dict[str, Any]:
    """One row: ours, the peers, the floor, the goal; and how the search compares with timing every candidate."""
    torch.manual_seed(0)
    inputs = case.inputs()
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "ours": vars(timed(case, case.run, inputs))}
    least = zip(case.flops, case.bytes, strict=True)
    row["floor"] = [1e3 * max(flops / ceilings["flops"], moved / ceilings["bytes"]) for flops, moved in least]
    peers = {name: run for name, run in case.peers.items() if skip is None or not name.startswith(skip)}
    row["peers"] = {name: vars(timed(case, run, inputs)) for name, run in peers.items()}
    row.update(against=case.against, goal=case.goal)
    if exhaustive:
        row["search"] = compare_search(case, inputs)
    return row


def timed(case: Case, run: Callable[..., Any], inputs: dict[str, Any]) -> Numbers:
    """Times an implementation; one that is missing or refuses is a note."""
    began = time.perf_counter()
    try:
        both = step(case, run, inputs)
        both()
        torch.cuda.synchronize()
        cold = time.perf_counter() - began

        def forward() -> Any:
            with torch.no_grad():
                return run(**inputs)

        eager = median_ms(both)
        try:
            times = (
                [step_ms(both)]
                if case.graphed
                else [graph_ms(f) for f in ([forward, both] if case.backward else [both])]
            )
            return Numbers(times[0], times[1] if case.backward else None, cold, eager, graphed=True)
        except RuntimeError as problem:  # it waits for the device, or chooses by what it computed
            if case.graphed:
                raise
            print(f"  {case.name} from Python: {type(problem).__name__} {str(problem)[:120]}", flush=True)
            torch.cuda.synchronize()
            renew_generator()
            return Numbers(median_ms(forward), eager if case.backward else None, cold, eager)
    except Exception as problem:  # noted in the table
        return Numbers(note=f"{type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}")


def graph_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of a CUDA graph of the call."""
    graph, _out = captured(run)  # it writes there at every replay
    return median_ms(graph.replay)


def step_ms(run: Callable[[], Any], times: int = 10) -> float:
    """Milliseconds of the call within a CUDA graph, as a model's decode step runs it: what starting a graph takes, as
    long as a small kernel, is left out. The L2 is read over before each call."""
    other = torch.zeros(2**26, dtype=torch.int32, device="cuda")

    def alone() -> None:
        for _ in range(times):
            other.max()

    def both() -> None:
        for _ in range(times):
            other.max()
            run()

    return (graph_ms(both) - graph_ms(alone)) / times


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, and what it returned. Its memory is its own: what earlier runs left is given back first,
    since a capture that runs out of memory never gives its own back."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def compare_search(case: Case, inputs: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of the tuned, best and default configurations over all launches of a case; device seconds that
    timing every candidate took."""
    with recording() as made:
        step(case, case.run, inputs)()
    tuned = best = default = spent = 0.0
    timer = search.Timer()
    for launch in {x.key: x for x in made}.values():
        candidates = list(launch.kernel.configs(launch.arguments))
        chosen = lookup.best(launch.kernel, launch.key, candidates) or candidates[0]
        before = search.device_us()
        times = {tuple(c.items()): t for c, t in search.exhaustive(launch)}
        spent += 1e-6 * (search.device_us() - before)
        tuned += statistics.median(timer.times(launch, chosen, 20))
        default += statistics.median(timer.times(launch, candidates[0], 20))
        best += statistics.median(timer.times(launch, dict(min(times, key=lambda c: times[c])), 20))
    return {"tuned_us": tuned, "best_us": best, "default_us": default, "exhaustive_device_s": spent}


def write(path: Path, rows: list[dict[str, Any]], refused: dict[str, str], ceilings: Any, tuning: Any) -> None:
    """Results as JSON: measured rows replace those of the same name, others stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {(r["op"], r["shape"]) for r in rows}
    data = {
        "environment": environment(),
        "ceilings": ceilings,
        "tuning": None if tuning is None else vars(tuning),
        "refused": refused,
        "rows": [r for r in old if (r["op"], r["shape"]) not in fresh] + rows,
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[0]
    versions = {"torch": torch.__version__, "triton": compiler().triton, "ptxas": compiler().ptxas}
    date = datetime.now(UTC).date().isoformat()
    return {"gpu": device().name, "driver": driver, "python": platform.python_version(), "date": date, **versions}


if __name__ == "__main__":
    main()
