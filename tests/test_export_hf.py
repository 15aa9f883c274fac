"""Exported folders for transformers: loaded where nothing of ours exists, they do what users do with a model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import CONV, DENSE, FULL, MODELS, WINDOW, mixer, model, prompt

from archsearch import cost
from archsearch.architecture import Block, ModelSpec
from archsearch.choosers import RandomChooser
from archsearch.errors import ExportError
from archsearch.export import export_model
from archsearch.export.hf.card import HubCard
from archsearch.export.hf.code import configuration_code, modeling_code, training_code
from archsearch.export.hf.parity import loaded_folder
from archsearch.export.hf.tokenizer import byte_letters, byte_tokenizer
from archsearch.export.kernels import glue_code, used
from archsearch.model import build_model
from archsearch.recipes import recipe_names, recipe_path
from archsearch.space import SearchSpace
from archsearch_kernels.dispatch import using

GDN = mixer("gated_deltanet", head_dim=16)
TEXT = model(Block(WINDOW, DENSE), Block(CONV, DENSE), Block(GDN, DENSE), d_model=32, vocab_size=257)

ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("archsearch", "archsearch_kernels"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Nothing())
"""

# What users do; every line of `found` is one way of using the folder and must come to the same.
USE = (
    ALONE
    + """
import sys, tempfile
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    tokens = torch.load(folder / "tokens.pt")
    found = {"n_params": sum(p.numel() for p in model.parameters())}
    with torch.no_grad():
        found["logits"] = model(tokens, use_cache=False).logits
        found["logits_cached"] = model(tokens).logits
        first = model(tokens[:, :21])
        pieces, cache = [first.logits], first.past_key_values
        pieces += [model(t, past_key_values=cache).logits for t in tokens[:, 21:].split(7, dim=1)]
        found["logits_in_pieces"] = torch.cat(pieces, dim=1)
        found["logits_to_keep"] = model(tokens, logits_to_keep=2).logits
        found["hidden"] = len(model(tokens, output_hidden_states=True).hidden_states)
        found["embeds"] = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits

        one, two = tokens[:1, :40], tokens[1:, :31]
        ways = dict(max_new_tokens=8, eos_token_id=None, pad_token_id=0)
        for way, options in {
            "greedy": {"do_sample": False},
            "beam": {"do_sample": False, "num_beams": 3},
            "sample": {"do_sample": True, "top_k": 20},
            "chunked": {"do_sample": False, "prefill_chunk_size": 16},
        }.items():
            alone = []
            for text in (one, two):
                mask = torch.ones_like(text)
                for use_cache in (True, False) if way != "chunked" else (True,):
                    torch.manual_seed(1)
                    out = model.generate(text, attention_mask=mask, use_cache=use_cache, **options, **ways)
                    found[f"{way} {len(alone)} {use_cache}"] = out
                alone.append(found[f"{way} {len(alone)} True"][:, text.shape[1]:])
            if way != "sample":
                padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), two], dim=1)
                both = torch.cat([one, padded])
                mask = torch.ones_like(both)
                mask[1, :9] = 0
                for use_cache in (True, False) if way != "chunked" else (True,):
                    out = model.generate(both, attention_mask=mask, use_cache=use_cache, **options, **ways)
                    found[f"{way} padded {use_cache}"] = torch.equal(out[:, 40:], torch.cat(alone))

        class Streamer:
            def __init__(self):
                self.tokens, self.ended = [], False
            def put(self, value):
                self.tokens += value.flatten().tolist()
            def end(self):
                self.ended = True

        streamer = Streamer()
        model.generate(one, attention_mask=torch.ones_like(one), do_sample=False, streamer=streamer, **ways)
        found["stream"] = streamer.ended and streamer.tokens == found["greedy 0 True"][0].tolist()

        documents = torch.cat([tokens[:1, :40], tokens[1:, :31]], dim=1)
        number = torch.tensor([[0] * 40 + [1] * 31])
        position = torch.tensor([[*range(40), *range(31)]])
        found["packed"] = model(documents, seq_idx=number, use_cache=False).logits
        found["packed by position"] = model(documents, position_ids=position, use_cache=False).logits
        found["apart"] = torch.cat([model(one).logits, model(two).logits], dim=1)

        with tempfile.TemporaryDirectory() as again:
            model.save_pretrained(again)
            found["files again"] = sorted(p.name for p in Path(again).iterdir())
            loaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, device_map="cpu").eval()
            found["again"] = all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        found["tied"] = (model.lm_head.weight is model.model.embed_tokens.weight, config.tie_word_embeddings)
        made = AutoModel.from_config(config, trust_remote_code=True)
        found["fresh"] = {name: (float(p.mean()), float(p.std())) for name, p in made.named_parameters()}
        half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        found["half"] = half(tokens).logits.dtype == torch.bfloat16 == half.dtype
    grads = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        found[f"loss {checkpointing}"] = float(loss)
    found["grads"] = max(float((a - grads[1][n]).abs().max() / a.abs().max()) for n, a in grads[0].items())
    torch.save(found, folder / "found.pt")
strangers = [name for name in sys.modules if name.split(".")[0] in ("archsearch", "archsearch_kernels")]
assert not strangers, strangers
"""
)


def run_bare(code: str, *arguments: object, cache: Path, path: str | None = None) -> str:
    """Run Python code in a process that knows neither this project nor the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "HF_HOME": str(cache)}
    if path is not None:
        environment["PYTHONPATH"] = path
    command = [sys.executable, "-P", "-B", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cache)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def plain_torch() -> Iterator[None]:
    """Exported code is plain torch; so is what it is compared with."""
    with using("reference"):
        yield


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that a test compares itself need not be compared at length before."""
    monkeypatch.setattr("archsearch.export.hf.parity.GREEDY", 8)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("few_steps")
def test_used_where_nothing_of_ours_is(tmp_path: Path) -> None:
    """Every model exported with random weights, then used in one bare process."""
    out = {}
    for number, (name, spec) in enumerate(MODELS.items()):
        weights = build_model(spec, seed=7).state_dict()
        out[name] = export_model(spec, tmp_path / f"m{number}", weights=weights, name=f"m{number}", format="hf")
        torch.save(prompt(spec), out[name] / "tokens.pt")
    (tmp_path / "cache").mkdir()
    run_bare(USE, *out.values(), cache=tmp_path / "cache")
    for name, folder in out.items():
        check_use(MODELS[name], folder)


@torch.no_grad()
def check_use(spec: ModelSpec, folder: Path) -> None:
    """What came of USE, against the search model and against itself."""
    search, tokens = build_model(spec, seed=7).eval(), prompt(spec)
    found = torch.load(folder / "found.pt")
    logits = search(tokens)
    scale = float(logits.abs().max())

    def same(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
        torch.testing.assert_close(one, other, atol=tolerance * scale, rtol=0)

    same(found["logits"], logits, 1e-5)
    for way in ("logits_cached", "logits_in_pieces", "embeds"):
        same(found[way], logits, 1e-4)
    same(found["logits_to_keep"], logits[:, -2:], 1e-4)
    assert found["n_params"] == cost.params(spec)
    assert found["hidden"] == spec.n_blocks + 1
    for way in ("greedy", "beam", "sample"):
        for i in (0, 1):
            assert torch.equal(found[f"{way} {i} True"], found[f"{way} {i} False"]), way
    for i in (0, 1):
        assert torch.equal(found[f"chunked {i} True"], found[f"greedy {i} True"])
    assert found["greedy padded True"]
    assert found["greedy padded False"]
    assert found["beam padded True"]
    assert found["beam padded False"]
    assert found["chunked padded True"]
    assert found["stream"]
    same(found["packed"], found["apart"], 1e-4)
    assert torch.equal(found["packed"], found["packed by position"])
    assert found["again"]
    code = {f"{part}_{folder.name}.py" for part in ("modeling", "configuration")}
    assert {*code, "config.json", "model.safetensors"} <= set(found["files again"])
    assert found["tied"] == (spec.trunk.tie_embeddings,) * 2
    assert found["half"]
    assert found["loss True"] == pytest.approx(found["loss False"], rel=1e-5)
    assert found["grads"] < 1e-3
    fresh = dict(build_model(spec, seed=3).named_parameters())
    for parameter_name, (mean, std) in found["fresh"].items():
        theirs = fresh[parameter_name.replace("embed_tokens", "embed").replace("layers.", "blocks.")]
        n = theirs.numel()
        expected, spread = float(theirs.mean()), float(theirs.std()) if n > 1 else 1.0
        assert mean == pytest.approx(expected, abs=8 * spread / n**0.5 + 1e-3), parameter_name
        if n > 4000:
            assert std == pytest.approx(spread, rel=10 / n**0.5), parameter_name


def spaces() -> list[str]:
    return [*recipe_names(), "quickstart"]


def space(name: str) -> SearchSpace:
    path = recipe_path(name) if name in recipe_names() else recipe_path(recipe_names()[0]).parents[1] / f"{name}.yaml"
    return SearchSpace.load(path)


LOAD = (
    ALONE
    + """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.load(folder / "tokens.pt")
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens[1:, :-5]], dim=1)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    ways = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        out = {"logits": model(tokens, use_cache=False).logits, "cached": model(tokens).logits}
        both = model.generate(torch.cat([tokens[:1], padded]), attention_mask=mask, **ways)
        for row, text in ((0, tokens[:1]), (1, tokens[1:, :-5])):
            alone = model.generate(text, attention_mask=torch.ones_like(text), **ways)
            out[f"padded {row}"] = torch.equal(both[row, -4:], alone[0, -4:])
    torch.save(out, folder / "out.pt")
assert not [name for name in sys.modules if name.split(".")[0] in ("archsearch", "archsearch_kernels")]
"""
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("few_steps")
@torch.no_grad()
def test_draws_from_every_shipped_space(tmp_path: Path) -> None:
    """Sampled, built, exported, loaded in a bare process, compared; as deep as the layout needs to repeat."""
    drawn: dict[str, ModelSpec] = {}
    for seed, name in enumerate(spaces()):
        spec = space(name).sample(RandomChooser(seed)).architecture.at("proxy")
        drawn[name] = spec
    out = {}
    for number, (name, spec) in enumerate(drawn.items()):
        weights = build_model(spec, seed=7).state_dict()
        out[name] = export_model(spec, tmp_path / f"d{number}", weights=weights, name=f"d{number}", format="hf")
        torch.save(prompt(spec, 70), out[name] / "tokens.pt")
    (tmp_path / "cache").mkdir()
    run_bare(LOAD, *out.values(), cache=tmp_path / "cache")
    for name, spec in drawn.items():
        logits = build_model(spec, seed=7).eval()(prompt(spec, 70))
        found, scale = torch.load(out[name] / "out.pt"), float(logits.abs().max())
        torch.testing.assert_close(found["logits"], logits, atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(found["cached"], logits, atol=1e-4 * scale, rtol=0)
        assert found["padded 0"], name
        assert found["padded 1"], name


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
        "wanted = model(**batch, use_cache=False).logits\n"
        "torch.testing.assert_close(compiled(**batch, use_cache=False).logits, wanted)\n"
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
