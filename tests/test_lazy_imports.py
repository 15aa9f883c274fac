"""What a trial does not import: torch's compiler and sympy take seconds, which every worker would pay."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kernel_checks import ON_GPU

SLOW = ("torch._dynamo", "torch._inductor", "sympy")
START = f"""
import sys

def check(what):
    found = [name for name in {SLOW} if name in sys.modules]
    assert not found, f"{{what}}: {{found}}"

from archsearch.architecture import Block, ModelSpec, parse_ffn, parse_mixer
from archsearch.data import open_corpus
from archsearch.latency.measure import Bench
from archsearch.mixers import MIXERS
from archsearch.model import build_model
from archsearch.settings import Task, Train
from archsearch.train import evaluate, train
import archsearch.trial

parallel = {{"of": [{{"kind": "attention", "head_dim": 32}}, {{"kind": "mamba"}}]}}
rest = {{"attention": {{"head_dim": 32}}, "parallel": parallel}}
ffns = [{{"kind": "swiglu"}}, {{"kind": "moe", "n_experts": 4, "routing": "sigmoid"}}, {{"kind": "mlp"}}]
kinds = [kind for kind in MIXERS.table if kind != "none"]
blocks = []
for i, kind in enumerate(kinds):
    mixer = parse_mixer({{"kind": kind, **rest.get(kind, {{}})}}).at_context(64)
    blocks.append(Block(mixer, parse_ffn(ffns[i % len(ffns)])))
spec = ModelSpec(128, 64, 257, tuple(blocks))
check("imports")
"""
TRAIN = """
corpus, settings = open_corpus(Task(), None), Train(tokens=128, batch_tokens=64, val_tokens=64)
model = build_model(spec, device=DEVICE)
check("building")
assert train(model, spec, corpus, settings, device=DEVICE).steps == 2
check("training")
evaluate(model, spec, corpus, settings, device=DEVICE)
check("validation")
"""
MEASURE = """
with Bench(spec, DEVICE, max_seconds=0.1) as bench:
    for work in (bench.decode, bench.prefill, bench.train_step):
        work(context=64, repeats=1)
    bench.peak_memory(context=64)
check("measuring")
"""


@pytest.mark.parametrize("work", [TRAIN, MEASURE], ids=["train", "measure"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_a_trial_with_every_mixer_imports_no_compiler(work: str, device: str) -> None:
    script = START + work.replace("DEVICE", repr(device))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
