"""Parallel efficiency: one study on a local Ray cluster with 1 worker, then with K, the same candidates in both.

python benchmarks/ray_efficiency.py --workers 2 --device cuda          32 trials, about 10 s each
python benchmarks/ray_efficiency.py --workers 2 --device cpu --trials 8 --trial-seconds 3 --small

python benchmarks/ray_efficiency.py --workers 2 --out kept --part one                   the same in two commands, the
python benchmarks/ray_efficiency.py --workers 2 --out kept --part many --steps N        second with the first's steps

python benchmarks/ray_efficiency.py --workers 4 --device cpu --small --part cores       what the cores can give

A short study first compiles the kernels and measures how long a step takes, which sets the steps of the others. Every
trial trains and is timed alone on its device, as in any study. The span is from the first trial's start to the last
one's end; the wall time has the start of Ray and of the workers in it. Efficiency: span(1) / (K span(K)).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from archsearch.store import RunFolder, TrialRecord

SPACE = """
archsearch: 1
name: NAME
scales:
  proxy:  PROXY
  target: TARGET
mixers:
  full: {kind: attention, head_dim: 64}
  gdn:  {kind: gated_deltanet, head_dim: 64, expand_v: 1}
  conv: {kind: short_conv}
ffns:
  dense: {kind: swiglu, expand: 2}
layout: {mixer: {each: [full, gdn, conv]}, ffn: dense}
rules: [count(full) >= 1, count(gdn) >= 1]
objectives: [{name: val_bpb}, {name: decode_ms, at: {batch: 4}}]
train: {tokens: TOKENS, batch_tokens: BATCH, val_tokens: BATCH}
search: {trials: TRIALS, sampler: random}
runtime: {threads: 1, latency_repeats: 10, tune: cached, keep_checkpoints: front}
"""
SIZES = {
    "proxy": "{n_blocks: 6, d_model: 256, context: 512}",
    "target": "{n_blocks: 8, d_model: 512, context: 4096, vocab_size: 32000}",
    "small proxy": "{n_blocks: 4, d_model: 64, context: 64}",
    "small target": "{n_blocks: 4, d_model: 64, context: 256, vocab_size: 257, dtype: float32}",
}
SPEED_TRIALS = 5
CORE_TRIALS = 8
CLOCKS = 0.05  # seconds by which the worker's and the driver's times may differ


def study(place: Path, name: str, workers: int, steps: int, trials: int, arguments: argparse.Namespace) -> float:
    """Run a study on Ray to its end; returns its wall time in seconds."""
    began = time.monotonic()
    finish(launch(place, name, ["--runner", "ray", "--workers", str(workers)], steps, trials, arguments))
    return time.monotonic() - began


def launch(
    place: Path, name: str, options: list[str], steps: int, trials: int, arguments: argparse.Namespace
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a study: its process, and where its output goes."""
    small = "small " if arguments.small else ""
    text = SPACE.replace("NAME", name).replace("TOKENS", str(steps * batch(arguments))).replace("TRIALS", str(trials))
    text = text.replace("PROXY", SIZES[f"{small}proxy"]).replace("TARGET", SIZES[f"{small}target"])
    (place / f"{name}.yaml").write_text(text.replace("BATCH", str(batch(arguments))))
    command = [sys.executable, "-m", "archsearch", "launch", str(place / f"{name}.yaml"), "--json", *options]
    command += ["--device", arguments.device, "--run-dir", str(place)]
    with (place / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log), place / f"{name}.log"


def finish(launched: tuple[subprocess.Popen[bytes], Path]) -> None:
    """Wait for a study; SystemExit with the end of its output if it failed."""
    process, log = launched
    if process.wait():
        raise SystemExit(f"study {log.stem}: exit code {process.returncode}\n{log.read_text()[-4000:]}")


def batch(arguments: argparse.Namespace) -> int:
    """Tokens of a step."""
    return 512 if arguments.small else 16384


def speed_steps(arguments: argparse.Namespace) -> int:
    """Steps of the trials that measure the speed: many, as a device takes some to reach its own."""
    return 20 if arguments.small else 400


def complete(place: Path, name: str) -> list[TrialRecord]:
    """The records of trials that were trained, first ended first; SystemExit if one failed."""
    records = RunFolder.open(place / name).records()
    failed = [record for record in records if record.status == "infeasible" and record.reason not in ("rule", "graph")]
    if failed:
        raise SystemExit(f"trial {failed[0].trial} of {name}: {failed[0].reason}: {failed[0].message}")
    return sorted((record for record in records if record.status == "complete"), key=end)


def end(record: TrialRecord) -> float:
    """When it ended, in seconds since 1970."""
    return datetime.fromisoformat(record.finished).timestamp()


def start(record: TrialRecord) -> float:
    """When its worker began with it."""
    return end(record) - record.seconds["total"]


def steps_for(arguments: argparse.Namespace, records: list[TrialRecord]) -> int:
    """Steps of trials that last --trial-seconds on average, of a study's records; the first compiled kernels."""
    known = sorted(records, key=start)[1:]
    step = statistics.mean(batch(arguments) / record.metrics["tokens_per_s"] for record in known)
    rest = statistics.mean(record.seconds["total"] for record in known) - step * speed_steps(arguments)
    print(f"speed: {1e3 * step:.2f} ms a step, {rest:.2f} s a trial beside", flush=True)
    return max(1, round((arguments.trial_seconds - rest) / step))


def lanes(records: list[TrialRecord]) -> list[list[TrialRecord]]:
    """The trials of each worker, in order: a trial goes where one ended last before it starts."""
    found: list[list[TrialRecord]] = []
    for record in sorted(records, key=start):
        free = [lane for lane in found if end(lane[-1]) <= start(record) + CLOCKS]
        if free:
            max(free, key=lambda lane: end(lane[-1])).append(record)
        else:
            found.append([record])
    return found


def span(records: list[TrialRecord]) -> float:
    """Seconds from the first start to the last end."""
    return max(map(end, records)) - min(map(start, records))


def rate(records: list[TrialRecord], workers: int) -> float:
    """Trials a second that end after each worker has ended one, to the last."""
    ends = sorted(map(end, records))
    return (len(ends) - workers) / (ends[-1] - ends[workers - 1])


def describe(records: list[TrialRecord], workers: int) -> None:
    """What a study took, and what the first trial of each worker took beyond the median of the later ones."""
    busy = sum(record.seconds["total"] for record in records)
    waits = sum(record.seconds.get("wait", 0.0) for record in records)
    print(
        f"{workers} workers: {len(records)} trials, span {span(records):.1f} s, in trials {busy:.1f} s "
        f"({busy / len(records):.2f} each, {waits:.1f} waiting to be alone); "
        f"{rate(records, workers):.3f} a second after the first of each worker"
    )
    firsts = [lane[0] for lane in lanes(records)]
    later = [record for record in records if record not in firsts]
    parts = sorted({part for record in records for part in record.seconds})
    usual = {part: statistics.median(record.seconds.get(part, 0.0) for record in later) for part in parts}
    print("  later trials, median:", ", ".join(f"{part} {usual[part]:.2f}" for part in parts), "s")
    for number, first in enumerate(firsts):
        more = {part: first.seconds.get(part, 0.0) - usual[part] for part in parts}
        rest = ", ".join(f"{part} {more[part]:+.2f}" for part in parts if part != "total")
        print(f"  first trial of worker {number}: {more['total']:+.2f} s; {rest}", flush=True)


def compare(place: Path, workers: int) -> None:
    """The efficiency of the two studies in a folder."""
    one, many = complete(place, "workers-1"), complete(place, f"workers-{workers}")
    if {record.arch_id for record in one} != {record.arch_id for record in many}:
        raise SystemExit("the two studies have NOT the same architectures")
    if one[0].tokens != many[0].tokens:
        raise SystemExit(f"trials of one study have {one[0].tokens} tokens, of the other {many[0].tokens}")
    print(f"efficiency of {workers} workers: {span(one) / workers / span(many):.3f}, the same architectures in both")
    print(f"after the first trial of each worker: {rate(many, workers) / workers / rate(one, 1):.3f}")


def cores(place: Path, workers: int, steps: int, arguments: argparse.Namespace) -> None:
    """How fast training is in each of K processes side by side that know nothing of each other, beside one alone."""
    alone = ["--runner", "local", "--workers", "1"]
    finish(launch(place, "alone", alone, steps, CORE_TRIALS, arguments))
    for launched in [launch(place, f"beside-{k}", alone, steps, CORE_TRIALS, arguments) for k in range(workers)]:
        finish(launched)
    beside = statistics.mean(training(complete(place, f"beside-{k}")) for k in range(workers))
    kept = training(complete(place, "alone")) / beside
    print(f"{workers} processes side by side, without Ray: each keeps {kept:.3f} of the speed of one alone")


def training(records: list[TrialRecord]) -> float:
    """Seconds in training."""
    return sum(record.seconds["train"] for record in records)


def main() -> None:
    """Run what is asked for; compare when both studies are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--trial-seconds", type=float, default=10.0, help="aim for one trial, timing included")
    parser.add_argument("--steps", type=int, help="of every trial, in place of --trial-seconds")
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    parser.add_argument(
        "--part",
        choices=["both", "one", "many", "compare", "cores"],
        default="both",
        help="one worker's study, or the other's; cores: neither, what processes without Ray keep of their speed",
    )
    arguments = parser.parse_args()
    if arguments.part not in ("both", "cores") and arguments.out is None:
        parser.error("one part needs --out, where the other is or will be")
    if arguments.part == "many" and arguments.steps is None:
        parser.error("--part many needs --steps, as --part one printed them")
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.out or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if arguments.part != "compare":
            measure(place, Path(temporary), arguments)
        if all((place / f"workers-{workers}").exists() for workers in (1, arguments.workers)):
            compare(place, arguments.workers)


def measure(place: Path, temporary: Path, arguments: argparse.Namespace) -> None:
    """A short study that compiles the kernels and measures the speed, then those that are asked for."""
    study(temporary, "speed", 1, speed_steps(arguments), SPEED_TRIALS, arguments)
    found = steps_for(arguments, complete(temporary, "speed"))
    steps = arguments.steps or found
    print(f"{steps} steps a trial", flush=True)
    if arguments.part == "cores":
        cores(temporary, arguments.workers, steps, arguments)
        return
    parts = {"one": [1], "many": [arguments.workers], "both": [1, arguments.workers]}[arguments.part]
    for workers in parts:
        wall = study(place, f"workers-{workers}", workers, steps, arguments.trials, arguments)
        print(f"wall {wall:.1f} s, the start of Ray and its workers included")
        describe(complete(place, f"workers-{workers}"), workers)


if __name__ == "__main__":
    main()
