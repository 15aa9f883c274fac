"""The folder of a dialect: its files, what is compared before it is kept, and the command line."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_models import DELTA, GATED, GDN, GLOBAL, LOCAL, SANDWICH, layout, shaken
from example_run import record, write
from safetensors import safe_open

from archsearch.architecture import Architecture, ModelSpec
from archsearch.checkpoint import Checkpoint, Progress, save
from archsearch.cli import main
from archsearch.errors import ExportError
from archsearch.export import export_model
from archsearch.export.write import FORMATS
from archsearch.settings import Train

BYTES = layout(f"{LOCAL}, {GLOBAL}", "l g", "", SANDWICH, vocab_size=257)


def test_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    told = {"task": {"tokenizer": "bytes"}, "study": "A study"}
    said: list[str] = []
    out = export_model(
        BYTES, tmp_path / "out", weights="init", name="text", provenance=told, format="gemma3", say=said.append
    )
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "architecture.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert said == []
    config, generation = (json.loads((out / f"{part}config.json").read_text()) for part in ("", "generation_"))
    assert config["eos_token_id"] == generation["eos_token_id"] == generation["pad_token_id"] == 256
    assert config["pad_token_id"] is None  # its embedding would get no gradient
    assert "auto_map" not in config
    assert ModelSpec.from_json(json.loads((out / "architecture.json").read_text())["model"]) == BYTES
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nlicense: other\npipeline_tag: text-generation\n")
    assert "`Gemma3ForCausalLM`" in card
    assert "20 greedy tokens are the same; logits of 80 tokens at once and of 20 one by one; largest difference" in card
    assert AutoTokenizer.from_pretrained(out)("é").input_ids == list("é".encode())


def test_without_weights_there_is_a_configuration(tmp_path: Path) -> None:
    out = export_model(BYTES, tmp_path / "out", name="text", format="gemma3")
    assert not list(out.glob("*.safetensors"))
    assert "AutoModelForCausalLM.from_config(AutoConfig.from_pretrained" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["pad_token_id"] is None


def test_a_large_model_is_compared_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.export.dialects.parity.SMALL", 0)
    out = export_model(BYTES, tmp_path / "out", name="big", format="gemma3", weights="init")
    card = (out / "README.md").read_text()
    assert "logits of 2 blocks, each alone at full width; weights as loaded from the folder; largest diff" in card


def test_a_block_too_large_is_compared_at_less_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.export.dialects.parity.SMALL", 0)
    monkeypatch.setattr("archsearch.export.dialects.parity.LARGE_BLOCK", 30_000)
    out = export_model(BYTES, tmp_path / "out", name="big", format="gemma3")
    assert "2 blocks, each alone at full width (2 of them, large ones, at less);" in (out / "README.md").read_text()
    monkeypatch.setattr("archsearch.export.dialects.parity.LARGE_BLOCK", 5_000)
    with pytest.raises(ExportError, match="block 0 is too large to be compared, and no smaller width can be made"):
        export_model(BYTES, tmp_path / "other", name="big", format="gemma3")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archsearch.export.dialects.gemma3 import Gemma3
    from archsearch.export.dialects.translate import Translation

    right_config, right_tensors = Gemma3.config, Translation.tensors

    def swapped(self: Translation, state: Any) -> Any:
        made = right_tensors(self, state)
        at = "model.layers.0.mlp."
        made[f"{at}gate_proj.weight"], made[f"{at}up_proj.weight"] = (
            made[f"{at}up_proj.weight"],
            made[f"{at}gate_proj.weight"],
        )
        return made

    def renamed(self: Translation, state: Any) -> Any:
        made = right_tensors(self, state)
        return {name.replace("layers.1.mlp.up", "layers.1.mlp.top"): tensor for name, tensor in made.items()}

    for target, name, wrong, message in (
        (Translation, "tensors", swapped, "greedy token|Gemma-3's class differs from the search model"),
        (Translation, "tensors", renamed, r"model.layers.1.mlp.top_proj.weight is \(64, 64\) and not there"),
        (Gemma3, "config", lambda *a: right_config(*a) | {"sliding_window": 8}, "greedy token|differs"),
        (
            Gemma3,
            "config",
            lambda *a: right_config(*a) | {"intermediate_size": 32},
            r"is \(64, 64\) and not \(32, 64\)",
        ),
    ):
        for weights in ("init", None):
            with monkeypatch.context() as patch:
                patch.setattr(target, name, wrong)
                with pytest.raises(ExportError, match=message):
                    export_model(BYTES, tmp_path / "out", name="fine", format="gemma3", weights=weights)
            assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [("gemma3", "transformers", "archsearch[hf]"), ("fla", "fla.models", "flash-linear-attention>=0.6")],
)
def test_what_is_not_installed(
    name: str, package: str, install: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else found(module))
    spec = BYTES if name == "gemma3" else layout(DELTA, "t")
    message = rf"{package} is not installed; --format {name} .*pip install '{re.escape(install)}'"
    with pytest.raises(ExportError, match=message):
        export_model(spec, tmp_path / "out", name="fine", format=name)
    assert list(tmp_path.iterdir()) == []


def test_from_a_run_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained weights of a trial; a checkpoint has shared tensors once."""
    spec = layout(f"{GDN}, {GATED}", "g a; d e", "e: {kind: moe, n_experts: 2, top_k: 1, n_shared: 1}", vocab_size=257)
    architecture = Architecture({"proxy": spec, "target": spec})
    write(tmp_path / "run", [record(0, architecture.to_json(), arch_id=architecture.arch_id)])
    tensors = {f"model/{name}": tensor for name, tensor in shaken(spec).state_dict().items() if name != "head.weight"}
    kept = Checkpoint(spec, Train(), "0" * 64, Progress(), tensors)
    save(tmp_path / "run" / "checkpoints" / "0.safetensors", kept)
    command = ["export", str(tmp_path / "run"), "--pick", "0", "-o", str(tmp_path / "out"), "--format"]
    assert main([*command, "qwen3_next"]) == 0
    told = capsys.readouterr()
    assert told.out.split() == [str(tmp_path / "out")]
    assert told.err.startswith("qwen3_next: 64 parameters more, which gate the shared experts")
    router = kept.model_state()["blocks.1.ffn.router.weight"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.layers.1.mlp.gate.weight"), router)
    command[5] = str(tmp_path / "other")
    for name, message in (
        ("gemma3", "error: the trunk: Gemma-3 norms what goes into a branch"),
        ("qwen3", "error: there is no format 'qwen3'"),
    ):
        assert main([*command, name]) == 2
        assert capsys.readouterr().err.startswith(message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_formats_are_known_and_folders_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ExportError, match=r"no format 'qwen3'; expected one of .*falcon_h1.* Did you mean 'qwen3_next'"
    ):
        export_model(BYTES, tmp_path / "out", name="fine", format="qwen3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    with pytest.raises(ExportError, match="is not an empty folder"):
        export_model(BYTES, tmp_path / "mine", name="fine", format="gemma3")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = capsys.readouterr().out
    assert not [name for name in FORMATS if name not in shown]
