"""What an exported folder for transformers holds: code that reads well, files; and nothing at all if it is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_process import run_bare
from export_models import CONV, DENSE, FULL, GDN, MODELS, TEXT, prompt, space

from archsearch import cost
from archsearch.architecture import Block, ModelSpec
from archsearch.choosers import RandomChooser
from archsearch.errors import ExportError
from archsearch.export import export_model
from archsearch.export.hf.card import HubCard
from archsearch.export.hf.code import configuration_code, modeling_code, training_code
from archsearch.export.hf.folder import generation
from archsearch.export.hf.parity import loaded_folder
from archsearch.export.hf.tokenizer import END, byte_letters, byte_tokenizer, tokenizer_files
from archsearch.export.kernels import glue_code, used
from archsearch_kernels.dispatch import using


@pytest.fixture(scope="module", autouse=True)
def plain_torch() -> Iterator[None]:
    """Exported code is plain torch; so is what it is compared with."""
    with using("reference"):
        yield


@pytest.mark.parametrize("name", ["plain", "shared weights", "experts"])
def test_the_code_reads_well(name: str, tmp_path: Path) -> None:
    spec = MODELS[name]
    files = {"modeling_x.py": modeling_code(spec, "x"), "configuration_x.py": configuration_code(spec, "x", 0)}
    files["train.py"] = training_code(spec, {})
    files["kernels.py"] = glue_code(used(files["modeling_x.py"]), "x", "installed", beside=None)
    ruff = [sys.executable, "-m", "ruff"]
    for file, code in files.items():
        (tmp_path / file).write_text(code)
        for check in (["check", "--isolated"], ["format", "--isolated", "--check"]):
            command = [*ruff, *check, "--line-length", "120", str(tmp_path / file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
        if file != "kernels.py":
            assert "archsearch" not in code
        imported = set(re.findall(r"(?m)^\s*(?:from|import) (\w+)", code)) - {"torch", "transformers", "numpy"}
        assert imported - ({"archsearch_kernels"} if file == "kernels.py" else set()) <= set(sys.stdlib_module_names)
    if name == "plain":
        for word in ("window", "sink", "kv_from", "_extend_sharing", "balance_loss", "share(", "LOGIT_SCALE"):
            assert word not in files["modeling_x.py"], word


def test_a_hybrid_of_three_mixers_has_less_than_800_lines() -> None:
    spec = space("quickstart").sample(RandomChooser(0)).architecture.at("proxy")
    spec = replace(spec, blocks=tuple(Block(mixer, DENSE) for mixer in (CONV, FULL, GDN)))
    code = modeling_code(spec, "x")
    assert len(code.splitlines()) + len(HubCard("x", spec, True).modeling_docstring(code).splitlines()) + 2 < 800


def test_bytes_are_a_tokenizer_json() -> None:
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(json.dumps(byte_tokenizer()))
    text = "naïve \u2028 日本語 🎉\x00\r\n\tdef f(x):  return x"
    assert made.encode(text).ids == list(text.encode())
    assert made.decode(list(text.encode())) == text
    assert made.encode("a<|endoftext|>b").ids == [97, 256, 98]
    assert len(set(byte_letters())) == 256
    assert made.get_vocab_size() == 257


@pytest.mark.slow
def test_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    told = {"task": {"tokenizer": "bytes"}, "license": "MIT", "study": "A <study>"}
    out = export_model(TEXT, tmp_path / "out", weights="init", name="text", provenance=told, format="hf")
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "architecture.json",
        "config.json",
        "configuration_text.py",
        "generation_config.json",
        "kernels.py",
        "model.safetensors",
        "modeling_text.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.py",
    }
    readme = (out / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: transformers\nlicense: mit\npipeline_tag: text-generation\n")
    assert (
        "256 greedy tokens are the same; logits of 296 tokens at once and of 80 one by one; largest difference: "
        in readme
    )
    assert f"{cost.params(TEXT):,} parameters, as the formula of the search says" in readme
    assert "A \\<study\\>" in readme
    assert ModelSpec.from_json(json.loads((out / "architecture.json").read_text())["model"]) == TEXT
    said = run_bare(
        "import sys, torch\n"
        "from transformers import AutoTokenizer, AutoModelForCausalLM, pipeline\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "batch = tokenizer(['héllo', 'a longer text'], return_tensors='pt', padding=True)\n"
        "assert batch.input_ids[0].tolist() == [256] * 7 + list('héllo'.encode()), batch\n"
        "assert batch.attention_mask[0].tolist() == [0] * 7 + [1] * 6\n"
        "assert tokenizer.decode(list('héllo'.encode())) == 'héllo'\n"
        "assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 256\n"
        "ask = pipeline('text-generation', model=model, tokenizer=tokenizer)\n"
        "print(ask('hello', max_new_tokens=3)[0]['generated_text'][:5])\n"
        "compiled = torch.compile(model, backend='aot_eager', dynamic=False)\n"
        "with torch.no_grad():\n"  # with gradients below
        "    wanted = model(**batch, use_cache=False).logits\n"
        "    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, wanted)\n"
        "alone = batch.input_ids[1:]\n"
        "fresh = torch.compile(model, backend='aot_eager', fullgraph=True)\n"
        "torch.testing.assert_close(fresh(alone, use_cache=False).logits, model(alone).logits)\n"
        "print('compiled')\n",
        out,
        cache=tmp_path / "cache",
    )
    assert said.splitlines()[-2:] == ["hello", "compiled"]


@torch.no_grad()
def test_what_a_forward_refuses(tmp_path: Path) -> None:
    (tmp_path / "modeling_x.py").write_text(modeling_code(TEXT, "x", with_kernels=False))
    (tmp_path / "configuration_x.py").write_text(configuration_code(TEXT, "x", None))
    with loaded_folder(tmp_path, "x") as module:
        made = module.HybridForCausalLM(module.HybridConfig()).eval()
        tokens = prompt(TEXT, 12)
        cache = made(tokens).past_key_values
        for message, arguments in {
            r"attention_mask is \[2, 3\]; expected \[2, 15\], zeros for padding": {
                "input_ids": tokens[:, :3],
                "attention_mask": torch.ones(2, 3),
                "past_key_values": cache,
            },
            r"attention_mask is \[2, 1, 12, 12\]; expected \[2, 12\]": {
                "input_ids": tokens,
                "attention_mask": torch.ones(2, 1, 12, 12),
            },
            "expected input_ids or inputs_embeds": {},
            "packed documents and a cache exclude": {
                "input_ids": tokens,
                "seq_idx": torch.zeros(2, 12),
                "past_key_values": cache,
            },
        }.items():
            with pytest.raises(ValueError, match=message):
                made(**arguments)
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.crop(3)
        with pytest.raises(ValueError, match=r"hidden_size, num_hidden_layers, layer_types are \(64, 3"):
            module.HybridConfig(hidden_size=64)
        grown = made.resize_token_embeddings(300)
        assert grown.weight.shape == (300, 32)
        assert made(tokens).logits.shape == (2, 12, 300)


def test_without_weights_there_is_a_configuration(tmp_path: Path) -> None:
    out = export_model(TEXT, tmp_path / "out", name="text", format="hf")
    assert not (out / "model.safetensors").exists()
    assert not (out / "tokenizer.json").exists()
    assert "AutoModelForCausalLM.from_config(config" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("specials", "pad"), [(["</s>"], "</s>"), (["</s>", "<pad>"], "<pad>"), (["[SEP]", "[PAD]"], "[PAD]"), ([], END)]
)
def test_a_padding_token_is_used_where_there_is_one(specials: list[str], pad: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"a": 0, **{word: i for i, word in enumerate(specials, 1)}}
    made = Tokenizer(models.WordLevel(words, "a"))
    made.add_special_tokens(specials)
    made.save(str(tmp_path / "t.json"))
    files = tokenizer_files("t.json", 8, 96, tmp_path)
    assert files is not None
    assert files.config["pad_token"] == pad
    assert files.config["eos_token"] == (specials[0] if specials else END)
    assert files.pad_id == {"</s>": 1, END: 1}.get(pad, 2)
    assert files.end_id == 1
    assert generation(files.end_id, files.pad_id)["pad_token_id"] == files.pad_id
    assert generation(files.end_id)["pad_token_id"] == 1


def test_the_card_says_what_train_py_can_do() -> None:
    card = HubCard("x", TEXT, True, end_id=256).use()
    assert "--data 'text/*.txt' --tokens 1e9 --out trained` trains it further, with `--fresh` from the start;" in one(
        card
    )
    without = one(HubCard("x", TEXT, False).use())
    assert "--data tokens.bin --tokens 1e9 --out trained` trains it; with torchrun" in without
    assert "AutoTokenizer" not in one(HubCard("x", TEXT, True, "ids").use())
    assert "AutoTokenizer" in one(HubCard("x", TEXT, True, "ids", end_id=1).use())


def one(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())


REFUSED = {
    "a taken name": ({"name": "llama"}, "transformers has a model called 'llama' already"),
    "no identifier": ({"name": "my model"}, "is no Python identifier"),
    "weights that are missing": ({"weights": {}}, "do not fit the model: .* is missing"),
    "unknown weights": ({"weights": {"more": torch.zeros(1)}}, "more is not one of its tensors"),
    "no such tokenizer": ({"provenance": {"task": {"tokenizer": "gone.json"}}}, "the tokenizer goes into the folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_left(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    arguments: dict[str, Any] = {"model_spec": TEXT, "weights": None, "name": "fine", "format": "hf", **changes}
    with pytest.raises(ExportError, match=message):
        export_model(out=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_code_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archsearch.export.hf import folder

    right = folder.modeling_code
    for old, new, message in (
        ("a * cos - b * sin", "a * cos + b * sin", "greedy token|differs from the search model"),
        ("cache.position)\n        y =", "0)\n        y =", "greedy token|differs from the search model"),
        ("n_kv_heads * head_dim, bias=False", "n_kv_heads * head_dim, bias=True", "has other tensors"),
    ):
        assert old in right(TEXT, "x")
        monkeypatch.setattr(folder, "modeling_code", lambda *a, o=old, n=new: right(*a).replace(o, n))
        with pytest.raises(ExportError, match=message):
            export_model(TEXT, tmp_path / "out", name="fine", weights="init", format="hf")
        assert list(tmp_path.iterdir()) == []


def test_a_large_model_is_compared_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archsearch.export.hf import parity

    monkeypatch.setattr(parity, "SMALL", 0)
    spec = replace(MODELS["shared keys and values"], dtype="bfloat16")
    out = export_model(spec, tmp_path / "out", name="big", format="hf")
    assert "blocks at full width; largest difference: none" in (out / "README.md").read_text()


def test_without_transformers_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archsearch.export.hf import folder

    monkeypatch.setattr(folder.metadata, "version", lambda _: "5.6.0")
    with pytest.raises(ExportError, match=r"transformers 5\.6\.0 is too old; .*pip install 'archsearch\[hf\]'"):
        export_model(TEXT, tmp_path / "out", name="fine", format="hf")
    monkeypatch.setattr(folder.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ExportError, match="transformers is not installed"):
        export_model(TEXT, tmp_path / "out", name="fine", format="hf")
    assert list(tmp_path.iterdir()) == []
