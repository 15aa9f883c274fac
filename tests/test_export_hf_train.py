"""The train.py of an exported folder: one process or two, with a stop or without, it comes to the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@pytest.fixture
def program(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The names of the exported train.py, which is to write to tmp_path/out."""
    space: dict[str, Any] = {"__file__": str(folder / "train.py"), "__name__": "train"}
    exec(compile((folder / "train.py").read_text(), "train.py", "exec"), space)
    (tmp_path / "out").mkdir()
    return space


def read(program: dict[str, Any], place: Path, name: str, field: str = "text") -> list[int]:
    """The tokens of a file, or of a glob."""
    (tokens,) = program["token_files"]([str(place / name)], field, place / "out", True)
    return [int(token) for token in tokens]


def test_other_data_is_packed_again_and_a_resumed_training_says_so(
    program: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("xy")
    packed = tmp_path / "out" / "tokens.u32"
    assert read(program, tmp_path, "a.txt") == [*b"abc", 256]
    before = packed.stat().st_ino
    assert read(program, tmp_path, "a.txt") == [*b"abc", 256]
    assert packed.stat().st_ino == before, "the same files are packed once"
    assert read(program, tmp_path, "*.txt") == [*b"abc", 256, *b"xy", 256]
    assert read(program, tmp_path, "b.txt") == [*b"xy", 256]
    (tmp_path / "b.txt").write_text("longer")
    assert read(program, tmp_path, "b.txt") == [*b"longer", 256]
    assert capsys.readouterr().err == ""
    (tmp_path / "out" / "checkpoint.pt").touch()
    read(program, tmp_path, "b.txt")
    assert capsys.readouterr().err == ""
    np.array([1, 2], dtype="<u2").tofile(tmp_path / "c.bin")
    assert read(program, tmp_path, "c.bin") == [1, 2]
    assert "goes on with other data than it was trained on" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(SystemExit):
        read(program, tmp_path, "bad.txt")
    assert read(program, tmp_path, "a.txt") == [*b"abc", 256], "what a failure left is not taken for the data"


def test_files_that_it_reads_and_refuses(
    program: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "ab", "n": 1}\n{"text": null}\n\n{"text": "c", "n": 2}\n')
    assert read(program, tmp_path, "rows.jsonl") == [97, 98, 256, 99, 256]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "ab"}\n{"text"\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    for name, field, message in (
        ("latin.txt", "text", r"error: .*latin\.txt is no UTF-8 text \(byte 3\)"),
        ("t.parquet", "text", r"error: .*t\.parquet: write its rows as \.jsonl"),
        ("bad.jsonl", "text", r"error: .*bad\.jsonl:2 is not JSON"),
        ("list.jsonl", "text", r"error: .*list\.jsonl:1 has no text in 'text'"),
        ("rows.jsonl", "n", r"error: .*rows\.jsonl:1 has no text in 'n'; name another --field"),
        ("none.txt", "text", r"error: there is no .*none\.txt"),
    ):
        with pytest.raises(SystemExit, match=message):
            read(program, tmp_path, name, field=field)
    monkeypatch.setitem(program, "HERE", tmp_path)
    with pytest.raises(SystemExit, match=r"has no tokenizer\.json; --data may name \.bin files only"):
        read(program, tmp_path, "rows.jsonl")


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
