"""Parallel efficiency: one study on a local Ray cluster with 1 worker, then with K, the same candidates in both.

python benchmarks/ray_efficiency.py --workers 2 --device cuda          32 trials, about 3 s each
python benchmarks/ray_efficiency.py --workers 2 --device cpu --trials 8 --trial-seconds 2 --small

A short study first compiles the kernels and measures how fast a worker trains, which sets the tokens of the others.
Every trial trains and is timed alone on its device, as in any study. The span is from the first trial's start to the
last one's end; the wall time has the start of Ray and of the workers in it. Efficiency: span(1) / (K span(K)).
"""

from __future__ import annotations

import argparse
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
FIRST_TOKENS = 40  # batches of the study that measures the speed


def study(place: Path, name: str, workers: int, tokens: int, trials: int, arguments: argparse.Namespace) -> float:
    """Launch a study; returns its wall time in seconds."""
    small = "small " if arguments.small else ""
    text = SPACE.replace("NAME", name).replace("TOKENS", str(tokens)).replace("TRIALS", str(trials))
    text = text.replace("PROXY", SIZES[f"{small}proxy"]).replace("TARGET", SIZES[f"{small}target"])
    (place / f"{name}.yaml").write_text(text.replace("BATCH", str(batch(arguments))))
    command = [sys.executable, "-m", "archsearch", "launch", str(place / f"{name}.yaml"), "--runner", "ray", "--json"]
    command += ["--workers", str(workers), "--device", arguments.device, "--run-dir", str(place)]
    began = time.monotonic()
    with (place / f"{name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}\n{(place / f'{name}.log').read_text()[-4000:]}"
        )
    return time.monotonic() - began


def batch(arguments: argparse.Namespace) -> int:
    return 512 if arguments.small else 16384


def complete(place: Path, name: str) -> list[TrialRecord]:
    records = RunFolder.open(place / name).records()
    failed = [record for record in records if record.status == "infeasible" and record.reason not in ("rule", "graph")]
    if failed:
        raise SystemExit(f"trial {failed[0].trial} of {name}: {failed[0].reason}: {failed[0].message}")
    return [record for record in records if record.status == "complete"]


def span(records: list[TrialRecord]) -> float:
    """Seconds from the first start to the last end."""
    ends = [datetime.fromisoformat(record.finished).timestamp() for record in records]
    starts = [end - record.seconds["total"] for end, record in zip(ends, records, strict=True)]
    return max(ends) - min(starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--trial-seconds", type=float, default=3.0, help="aim for one trial, timing included")
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.out or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        wall = study(place, "speed", 1, FIRST_TOKENS * batch(arguments), 3, arguments)
        last = complete(place, "speed")[-1]  # the first ones compiled kernels
        fixed = last.seconds["total"] - last.seconds["train"]
        steps = max(
            FIRST_TOKENS, round((arguments.trial_seconds - fixed) * last.metrics["tokens_per_s"] / batch(arguments))
        )
        print(
            f"speed: {wall:.0f} s; {last.metrics['tokens_per_s']:.0f} tokens/s, {fixed:.2f} s a trial beside training; "
            f"{steps} steps a trial",
            flush=True,
        )
        spans, architectures = {}, {}
        for workers in (1, arguments.workers):
            name = f"workers-{workers}"
            wall = study(place, name, workers, steps * batch(arguments), arguments.trials, arguments)
            records = complete(place, name)
            spans[workers], architectures[workers] = span(records), {record.arch_id for record in records}
            busy = sum(record.seconds["total"] for record in records)
            waits = sum(record.seconds.get("wait", 0.0) for record in records)
            print(
                f"{workers} workers: {len(records)} trials, wall {wall:.1f} s, span {spans[workers]:.1f} s, "
                f"in trials {busy:.1f} s ({busy / len(records):.2f} each, {waits:.1f} waiting to be alone)",
                flush=True,
            )
        same = "the same" if architectures[1] == architectures[arguments.workers] else "NOT the same"
        print(f"{same} architectures in both")
        print(
            f"efficiency of {arguments.workers} workers: {spans[1] / arguments.workers / spans[arguments.workers]:.3f}"
        )
        front = ["-m", "archsearch", "front", str(place / f"workers-{arguments.workers}")]
        print(subprocess.run([sys.executable, *front], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
