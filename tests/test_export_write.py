"""What is written, from what, and what is refused; whatever goes wrong, nothing is left behind."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from example_run import ENVIRONMENT, SETTINGS, record, write
from export_models import CONV, DENSE, FULL, load, mixer, model, prompt

from archsearch.architecture import Architecture, Block, ModelSpec
from archsearch.checkpoint import Checkpoint, Progress, save
from archsearch.errors import ExportError, RunError
from archsearch.export import export_model, export_run
from archsearch.export.card import Card
from archsearch.export.write import provenance
from archsearch.model import build_model
from archsearch.settings import Train
from archsearch.store import TrialRecord

TINY = model(Block(FULL, DENSE, "full", "dense"), Block(CONV, DENSE, "conv", "dense"), d_model=32, vocab_size=257)
TARGET = replace(TINY, d_model=64, vocab_size=128, dtype="bfloat16")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of one kept trial, one without its weights, and one that was refused."""
    architecture = Architecture({"proxy": TINY, "target": TARGET})
    other = Architecture({"proxy": replace(TINY, blocks=TINY.blocks[:1]), "target": TARGET})
    kept = record(0, architecture.to_json(), arch_id=architecture.arch_id)
    lost = record(1, other.to_json(), arch_id=other.arch_id, checkpoint=None)
    write(tmp_path / "run", [kept, lost])
    weights = build_model(TINY, seed=9).state_dict()
    del weights["head.weight"]  # a checkpoint holds shared tensors once
    tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    checkpoint = Checkpoint(TINY, Train(), "0" * 64, Progress(), tensors)
    save(tmp_path / "run" / "checkpoints" / "0.safetensors", checkpoint)
    return tmp_path / "run"


def left_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@torch.no_grad()
def test_a_trial_with_its_weights(run_folder: Path, tmp_path: Path) -> None:
    out = export_run(run_folder, "0", "proxy", tmp_path / "deep" / "out")
    assert left_in(tmp_path / "deep") == ["out"]
    assert left_in(out) == ["README.md", "config.json", "model.py", "model.safetensors"]
    made = load(out / "model.py").HybridLM.from_pretrained(out)
    search = build_model(TINY, seed=9).eval()
    assert torch.equal(made(prompt(TINY)), search(prompt(TINY)))
    readme = (out / "README.md").read_text()
    facts = [
        "# linear_sparse_full_",
        "| val\\_bpb | 1.",
        "target, context 32768, batch 1 |",
        "A token is a byte",
        "- study: linear-sparse-full",
        "- trained: 4,000,000 tokens at proxy scale",
        "torch 2.13.0",
        ENVIRONMENT["corpus_sha256"],
        "## Licence",
        "logits of 80 tokens, full forward and token by token; largest difference: none.",
    ]
    for fact in facts:
        assert fact in readme, fact
    config = json.loads((out / "config.json").read_text())
    assert ModelSpec.from_json(config["model"]) == TINY
    assert config["name"].startswith("linear_sparse_full_")
    assert config["provenance"]["objectives"]["decode_ms"]["where"] == "target, context 32768, batch 1"
    assert config["mixers"] == ["full", "conv"]


def test_running_the_file_goes_on_from_a_text(run_folder: Path, tmp_path: Path) -> None:
    out = export_run(run_folder, "0", "proxy", tmp_path / "out")
    command = [sys.executable, "-B", str(out / "model.py"), "import os"]
    done = subprocess.run(command, capture_output=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"import os")
    assert len(done.stdout) > 100


def test_at_target_scale_there_are_no_weights(run_folder: Path, tmp_path: Path) -> None:
    out = export_run(run_folder, "0", "target", tmp_path / "out", name="big")
    assert left_in(out) == ["README.md", "config.json", "model.py"]
    assert "init_weights()  # nothing is trained yet" in (out / "README.md").read_text()
    assert "not at this one" in (out / "README.md").read_text()
    module = load(out / "model.py")
    assert not hasattr(module, "main")
    assert module.HybridLM().embed.weight.shape == (128, 64)


def keeps(run_folder: Path, **known: str) -> None:
    """Note in a run what its corpus was packed with."""
    path = run_folder / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": known}))


def letters(path: Path) -> None:
    """A tokenizer.json of 150 ids: an end, a pad, and letters."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "</s>": 1, **{chr(i): i for i in range(2, 150)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.save(str(path))


def test_the_tokenizer_of_the_run_folder_goes_along(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    letters(run_folder / "tokenizer.json")
    keeps(run_folder, name="gone.json", sha256="0" * 64)
    out = export_run(run_folder, "0", "proxy", tmp_path / "out")
    assert left_in(out) == ["README.md", "config.json", "model.py", "model.safetensors", "tokenizer.json"]
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("cat").ids == list(b"cat")
    readme = (out / "README.md").read_text()
    assert "Tokens are those of `tokenizer.json` (package tokenizers); 1 ends a document." in readme
    assert "A token is a byte" not in readme
    assert "Try it: python model.py 1 2 3" in (out / "model.py").read_text()
    monkeypatch.setattr("archsearch.export.hf.parity.GREEDY", 8)
    hub = export_run(run_folder, "0", "proxy", tmp_path / "hub", format="hf")
    assert (hub / "tokenizer.json").read_text() == (out / "tokenizer.json").read_text()
    config = json.loads((hub / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 1)
    out = export_run(run_folder, "0", "target", tmp_path / "target")
    assert not (out / "tokenizer.json").exists(), "the target has 128 of its 150 ids"
    assert "Tokens are" not in (out / "README.md").read_text()


def test_an_unknown_tokenizer_is_told_and_not_guessed(run_folder: Path, tmp_path: Path) -> None:
    keeps(run_folder, name="t.bin.json", sha256="0" * 64)
    said: list[str] = []
    out = export_run(run_folder, "0", "proxy", tmp_path / "out", say=said.append)
    assert "no tokenizer goes into the folder: all that is known of it is its name, t.bin.json" in said
    assert "A token is" not in (out / "README.md").read_text()
    assert "Try it: python model.py 1 2 3" in (out / "model.py").read_text()
    keeps(run_folder, name="bytes", sha256="bytes")
    said.clear()
    out = export_run(run_folder, "0", "proxy", tmp_path / "bytes", say=said.append)
    assert "A token is a byte" in (out / "README.md").read_text()
    assert "tokenizer" not in "".join(said)


def test_an_older_run_whose_tokenizer_is_gone_says_so(run_folder: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "task": {"tokenizer": str(tmp_path / "gone.json")}}
    (run_folder / "settings.json").write_text(json.dumps(settings))
    said: list[str] = []
    out = export_run(run_folder, "0", "proxy", tmp_path / "out", say=said.append)
    assert not (out / "tokenizer.json").exists()
    assert any("gone.json' not found" in line for line in said)
    assert "gone.json" in (out / "README.md").read_text()
    letters(tmp_path / "gone.json")
    said.clear()
    out = export_run(run_folder, "0", "proxy", tmp_path / "again", say=said.append)
    assert (out / "tokenizer.json").exists()
    assert "not found" not in "".join(said)


REFUSED = {
    "name": ({"name": "my model"}, "'my model' is no Python identifier; write letters"),
    "keyword": ({"name": "import"}, "'import' is no Python identifier"),
    "code as a name": ({"name": "x\nimport os"}, "is no Python identifier"),
    "not ascii": ({"name": "modèle"}, "is no Python identifier"),
    "weights of another shape": (
        {"weights": build_model(replace(TINY, d_model=64)).state_dict()},
        r"embed.weight is \[257, 64\] and not \[257, 32\]",
    ),
    "missing weights": (
        {"weights": {"embed.weight": torch.zeros(257, 32)}},
        r"do not fit the model: blocks\.0\S+ is missing",
    ),
    "unknown weights": (
        {"weights": {**build_model(TINY).state_dict(), "more": torch.zeros(1)}},
        "do not fit the model: more is not one of its tensors",
    ),
    "a layout that is no model": ({"model_spec": replace(TINY, d_model=24)}, "head_dim 16 does not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_left(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    arguments: dict[str, Any] = {"model_spec": TINY, "weights": None, "name": "fine", **changes}
    with pytest.raises(ValueError, match=message):
        export_model(out=tmp_path / "out", **arguments)
    assert left_in(tmp_path) == []


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    for place in (full, file, link):
        with pytest.raises(ExportError, match="is not an empty folder"):
            export_model(TINY, place, name="fine")
    assert left_in(tmp_path) == ["file", "full", "link"]
    assert left_in(full) == ["thesis.tex"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert export_model(TINY, empty, name="fine") == empty
    assert "model.py" in left_in(empty)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_nobody_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ExportError, match="Permission denied"):
        export_model(TINY, tmp_path / "locked" / "out", name="fine")


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("archsearch.export.write.json.dumps", no_room)
    with pytest.raises(ExportError, match="No space left on device"):
        export_model(TINY, tmp_path / "out", name="fine", weights="init")
    assert left_in(tmp_path) == []


def test_weights_that_were_not_kept(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the weights of trial 1 were not kept.*keep_checkpoints: all"):
        export_run(run_folder, "1", "proxy", tmp_path / "out")
    (run_folder / "checkpoints" / "0.safetensors").unlink()
    with pytest.raises(ExportError, match="the weights of trial 0 were not kept"):
        export_run(run_folder, "0", "proxy", tmp_path / "out")
    with pytest.raises(ExportError, match="there is no scale 'huge'; expected one of proxy, target"):
        export_run(run_folder, "0", "huge", tmp_path / "out")
    with pytest.raises(RunError, match="is not a run folder"):
        export_run(tmp_path, "knee", "proxy", tmp_path / "out")
    assert left_in(tmp_path) == ["run"]


HOSTILE = [
    '"""; import os; os.abort()',
    "x\nimport os",
    "`whoami` </td><script>",
    "]) or exec('raise SystemExit')",
    "{0.__class__}",
    "a" * 500,
    "\\",
    "é",
    "lambda",
]


def test_names_from_a_space_are_never_code(tmp_path: Path) -> None:
    blocks = [Block(FULL if i % 2 else CONV, DENSE, name, name) for i, name in enumerate(HOSTILE)]
    hostile = {"study": HOSTILE[0], "description": HOSTILE[2], "license": HOSTILE[1], "task": {"tokenizer": HOSTILE[2]}}
    objectives = {HOSTILE[2]: {"value": 1.0, "spread": None, "unit": HOSTILE[0], "where": HOSTILE[1]}}
    told = {**hostile, "objectives": objectives}
    out = export_model(model(*blocks, d_model=32), tmp_path / "out", name="fine", provenance=told, weights="init")
    code = (out / "model.py").read_text()
    ast.parse(code)
    for name in HOSTILE[:-1]:
        assert name not in code
    assert "Mixers: 4x(short_conv attention) lambda" in code
    readme = (out / "README.md").read_text()
    assert "<script>" not in readme
    assert "`whoami`" not in readme
    assert json.loads((out / "config.json").read_text())["provenance"]["study"] == HOSTILE[0]


def test_text_options_are_quoted(tmp_path: Path) -> None:
    """A third party's mixer may take any text."""
    from example_plugin.spec import Average

    spec = model(Block(Average(flaw='"); raise SystemExit("'), DENSE), Block(FULL, DENSE), d_model=32)
    out = export_model(spec, tmp_path / "out", name="fine")
    ast.parse((out / "model.py").read_text())


def test_a_mixer_without_source_or_from_elsewhere(tmp_path: Path) -> None:
    from archsearch.contract import ModuleCall
    from archsearch.export.closure import Closure

    with pytest.raises(ExportError, match=r"numpy\.random\.mtrand has no Python source"):
        Closure([("numpy.random.mtrand", "RandomState")])
    with pytest.raises(ExportError, match="two of the mixers mean different things by join"):
        Closure([("a", "f"), ("b", "g")], {
            "a": "from os.path import join\ndef f(): return join",
            "b": "from shlex import join\ndef g(): return join",
        }).text()  # fmt: skip
    with pytest.raises(ExportError, match="which is not installed"):
        Closure([("a", "f")], {"a": "from nowhere_to_be_found import x\ndef f(): return x"})
    with pytest.raises(ExportError, match=r"exports need `from \.\.\. import`"):
        Closure([("a", "f")], {"a": "import numpy as np\ndef f(): return np"})
    assert ModuleCall("a:f").target == "a:f"


def test_helpers_of_one_name_are_told_apart() -> None:
    from archsearch.export.closure import Closure

    texts = {
        "ops.one.reference": "def _cut(x):\n    return x\n\n\ndef one(x):\n    return _cut(x)\n",
        "ops.two.reference": "def _cut(x):\n    return -x\n\n\ndef two(_cut_one, x):\n    return _cut(x) + _cut_one\n",
        "use": "from ops.one.reference import one as first\nfrom ops.two.reference import two\n\n\n"
        "def use(one):\n    return first(one), two(1, one)\n",
    }
    text = Closure([("use", "use")], texts).text()
    space: dict[str, Any] = {}
    exec(text, space)
    assert space["use"](3) == (3, -2)
    assert "_one_cut" in text
    assert "_two_cut" in text


def test_provenance_of_a_record() -> None:
    told = provenance(SETTINGS, ENVIRONMENT, example(), "target")
    assert told["objectives"]["val_bpb"]["unit"] == "bits/byte"
    assert told["trained"] == "the search trained it for 4,000,000 tokens at proxy scale, not at this one"
    assert provenance(SETTINGS, ENVIRONMENT, example(), "proxy")["trained"] == "4,000,000 tokens at proxy scale"
    assert told["data"].startswith("builtin, sha256 9f86")


def example() -> TrialRecord:
    return record(0, Architecture({"proxy": TINY, "target": TARGET}).to_json())


def test_the_card_of_a_layout() -> None:
    shared = model(
        Block(FULL, DENSE, "full", "dense"),
        *[Block(mixer("attention", head_dim=16, kv_groups=2), DENSE, "full", "dense", kv_from=0)] * 3,
        d_model=32,
    )
    readme = Card("fine", shared, has_weights=False).readme("With care.")
    assert "1-3    full (attention)  dense (swiglu)" in readme
    assert "keys and values of 0" in readme
    assert "Measured" not in readme
    assert "With care." in readme
    text = Card("fine", shared, has_weights=True, main="ids").docstring("# [B, T, H]")
    assert "Letters in shapes: B batch, T time, H heads." in text
    assert "Mixers: 4xfull" in text
