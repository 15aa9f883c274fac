"""The train.py of an exported folder: one process or two, with a stop or without, it comes to the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import CONV, DENSE, FULL, ffn, mixer, model

from archsearch.architecture import Block
from archsearch.export import export_model
from archsearch.export.hf.code import training_code
from archsearch.model import build_model, hidden_matrices, width_multipliers
from archsearch.settings import Train
from archsearch.train import schedule as search_schedule
from archsearch_kernels.dispatch import using

MOE = ffn("moe", n_experts=4, top_k=2, routing="sigmoid")
SPEC = model(Block(FULL, DENSE), Block(mixer("gated_deltanet", head_dim=16), MOE), d_model=64, vocab_size=257)
OPTIONS = ["--tokens", "4608", "--batch-tokens", "768", "--context", "96", "--lr", "0.01", "--precision", "fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with using("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("archsearch.export.hf.parity.GREEDY", 8)
        weights = build_model(SPEC, seed=1).state_dict()
        told = {"task": {"tokenizer": "bytes"}}
        out = tmp_path_factory.mktemp("train") / "out"
        return export_model(SPEC, out, weights=weights, name="small", provenance=told, format="hf")


def run(folder: Path, out: Path, *options: str, processes: int = 0) -> list[float]:
    """The losses that it prints."""
    (out.parent / "text").mkdir(exist_ok=True)
    for i in range(3):
        (out.parent / "text" / f"{i}.txt").write_text("".join(f"{n * n + i} is a number.\n" for n in range(90)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *launcher, str(folder / "train.py"), "--data", str(out.parent / "text" / "*.txt")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out.parent / "modules")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "--out", str(out), *OPTIONS, *options],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=out.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line)["loss"] for line in done.stdout.splitlines() if line.startswith("{")]


def trained(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_a_stop_and_then_sharding_change_nothing(folder: Path, tmp_path: Path) -> None:
    alone = run(folder, tmp_path / "alone")
    assert len(alone) == 6
    assert alone[-1] < alone[0] - 0.5
    two = run(folder, tmp_path / "two", "--stop-after", "3", "--micro-batch", "2", processes=2)
    assert not (tmp_path / "two" / "model").exists()
    two += run(folder, tmp_path / "two", "--fsdp", processes=2)
    assert two == pytest.approx(alone, abs=2e-3)
    wanted, found = trained(tmp_path / "alone"), trained(tmp_path / "two")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-3, rtol=0)
    before = build_model(SPEC, seed=1).state_dict()
    name = "blocks.1.mixer.qkv_proj.weight"
    assert float((wanted[name.replace("blocks", "model.layers")] - before[name]).abs().max()) > 0.01


@pytest.mark.slow
def test_muon_on_tokens_with_documents_apart(folder: Path, tmp_path: Path) -> None:
    tokens = np.tile(np.array([*b"the quick brown fox", 256], dtype="<u2"), 300)
    tokens.tofile(tmp_path / "tokens.bin")
    options = ["--optimizer", "muon", "--isolate", "--checkpointing", "--fresh", "--precision", "bf16"]
    losses = run(folder, tmp_path / "out", *options, "--data", str(tmp_path / "tokens.bin"))
    assert losses[-1] < losses[0] - 1


def test_its_learning_rates_are_those_of_the_search(folder: Path) -> None:
    space: dict[str, object] = {"__file__": str(folder / "train.py"), "__name__": "train"}
    settings = Train(lr=0.004, warmup=0.1, decay=0.3, weight_decay=0.05)
    text = training_code(SPEC, settings.model_dump())
    exec(compile(text, "train.py", "exec"), space)
    hidden = space["HIDDEN"]
    assert isinstance(hidden, tuple)
    scales = width_multipliers(SPEC)
    for name in scales:
        assert (name.startswith("blocks.") and name.endswith(hidden)) == (name in hidden_matrices(SPEC)), name
        assert scales[name] == (space["BASE_WIDTH"] / space["WIDTH"] if name in hidden_matrices(SPEC) else 1.0)  # type: ignore[operator]
    for step in range(40):
        assert space["schedule"](step, 40) == search_schedule(settings, step, 40)  # type: ignore[operator]
    assert space["LR"] == 0.004
    assert space["WEIGHT_DECAY"] == 0.05


def test_conv_is_no_matrix_that_follows_the_width() -> None:
    spec = model(Block(CONV, DENSE))
    assert "conv_weight" not in training_code(spec, {})
