"""The evaluation harness (lm_eval) on an exported folder: its numbers are those of the search model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_models import CONV, DENSE, WINDOW, mixer, model

from archsearch.architecture import Block
from archsearch.export import export_model
from archsearch.model import HybridLM, build_model
from archsearch_kernels.dispatch import using

GDN = mixer("gated_deltanet", head_dim=16)
SPEC = model(Block(WINDOW, DENSE), Block(CONV, DENSE), Block(GDN, DENSE), d_model=32, vocab_size=257)
ROWS = [
    {"ask": f"{n} + {n} =", "choices": [f" {2 * n}", f" {2 * n + 1}"], "text": f"{n} + {n} is {2 * n}."}
    for n in range(9)
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ask}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{ask}}",
        "generation_kwargs": {"until": ["\0"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}

# `python -m lm_eval` without its own tasks: to index 14,000 files takes longer than all else here
HARNESS = """
from functools import partialmethod
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
cli_evaluate()
"""


def nats(search: HybridLM, before: list[int], text: str) -> float:
    """Minus the logarithm of the probability of a text after some tokens."""
    tokens = torch.tensor([[*before, *text.encode()]])
    picked = search(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[0, :, 0]
    return -float(picked[len(before) - 1 :].sum())


@pytest.mark.slow
@torch.no_grad()
def test_the_harness_measures_the_search_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.export.hf.parity.GREEDY", 8)
    with using("reference"):
        search = build_model(SPEC, seed=4).eval()
        told = {"task": {"tokenizer": "bytes"}}
        weights = search.state_dict()
        folder = export_model(SPEC, tmp_path / "out", weights=weights, name="small", provenance=told, format="hf")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        whole = {"task": f"local_{name}", "test_split": "test", **data, **task}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    command = [sys.executable, "-P", "-c", HARNESS, "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += [
        "--model_args",
        f"pretrained={folder},trust_remote_code=True",
        "--include_path",
        str(tmp_path / "tasks"),
    ]
    command += ["--tasks", ",".join(f"local_{name}" for name in TASKS), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]

    total = sum(nats(search, [256], row["text"]) for row in ROWS)  # type: ignore[arg-type]
    n_bytes = sum(len(str(row["text"])) for row in ROWS)
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(total / n_bytes / math.log(2), rel=1e-4)
    right = sum(
        nats(search, [*ask(row)], row["choices"][0]) < nats(search, [*ask(row)], row["choices"][1]) for row in ROWS
    )
    assert results["local_choice"]["acc,none"] == pytest.approx(right / len(ROWS))
    (samples,) = (tmp_path / "results").rglob("samples_local_generation*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        tokens = torch.tensor([list(sample["doc"]["text"].encode())])
        for _ in range(6):
            tokens = torch.cat([tokens, search(tokens)[:, -1:].argmax(-1)], dim=1)
        said = bytes(token for token in tokens[0, -6:].tolist() if token < 256).decode(errors="replace")
        assert sample["resps"] == [[said]]


def ask(row: dict[str, object]) -> bytes:
    """The question of a row, as tokens."""
    return str(row["ask"]).encode()
