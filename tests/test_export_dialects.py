"""Dialects: stock classes of transformers and fla load the folder and compute what was searched, or it is refused."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from example_run import record, write
from safetensors import safe_open

from archsearch import cost
from archsearch.architecture import Architecture, ModelSpec
from archsearch.checkpoint import Checkpoint, Progress, save
from archsearch.cli import main
from archsearch.errors import ExportError
from archsearch.export import export_model
from archsearch.export.dialects import DIALECTS, dialect
from archsearch.export.dialects.base import Refused, share
from archsearch.export.dialects.parity import plain_torch
from archsearch.export.dialects.translate import translate
from archsearch.export.write import FORMATS
from archsearch.model import HybridLM, build_model
from archsearch.recipes import First, recipe_path
from archsearch.settings import Train
from archsearch.space import SearchSpace

SCALE = "{n_blocks: %d, d_model: %d, context: 96, dtype: %s%s}"


def resolved(text: str, n_blocks: int, d_model: int = 64, dtype: str = "float32", vocab_size: int = 61) -> ModelSpec:
    """The model that the layout in `text` is at these sizes."""
    proxy, target = (SCALE % (n_blocks, d_model, dtype, vocab) for vocab in ("", f", vocab_size: {vocab_size}"))
    head = f"archsearch: 1\nname: tiny\nscales: {{proxy: {proxy}, target: {target}}}\n"
    return SearchSpace.from_text(head + text).sample(First()).architecture.at("target")


def recipe(name: str, n_blocks: int, d_model: int = 64, **changes: str) -> ModelSpec:
    """A shipped one with heads of 16, at a small width."""
    text = recipe_path(name).read_text().replace("head_dim: 64", "head_dim: 16")
    for option, value in changes.items():
        text = re.sub(rf"{option}: [^,}}]+", f"{option}: {value}", text)
    return resolved(text[text.index("mixers:") :], n_blocks, d_model)


def layout(mixers: str, blocks: str, ffns: str = "", trunk: str = "", **sizes: Any) -> ModelSpec:
    """`a a b` of the mixers; the FFNs likewise after a `;`, else a dense one in each block."""
    blocks, _, ffn_blocks = blocks.partition(";")
    names = blocks.split()
    ffn_names = ffn_blocks.split() or ["d"] * len(names)
    ffns = ", ".join(filter(None, ["d: {kind: swiglu, expand: 1}", ffns]))
    places = f"mixer: {{blocks: [{', '.join(names)}]}}, ffn: {{blocks: [{', '.join(ffn_names)}]}}"
    text = f"mixers: {{{mixers}}}\nffns: {{{ffns}}}\ntrunk: {{{trunk}}}\nlayout: {{{places}}}\n"
    return resolved(text, len(names), **sizes)


def shaken(spec: ModelSpec) -> HybridLM:
    """A model in which no bias is 0 and no norm 1, in its own dtype, so that every tensor has to be in its place."""
    model = build_model(spec, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor.to(getattr(torch, spec.dtype)))
    return model


def same_as_stock(spec: ModelSpec, name: str, folder: Path, added: int = 0) -> Any:
    """Export, load it as anybody would, compare logits and greedy tokens; returns the stock model."""
    from transformers import AutoModelForCausalLM

    search = shaken(spec)
    export_model(spec, folder, weights=search.state_dict(), name="tiny", format=name)
    assert not list(folder.glob("*.py"))
    with ExitStack() as stack:
        stack.enter_context(translate(dialect(name), spec).dialect.on_cpu())
        stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        stack.enter_context(plain_torch(type(stock)))
        assert type(stock).__module__.split(".")[:2] == ["fla" if name == "fla" else "transformers", "models"]
        assert sum(p.numel() for p in stock.parameters()) == cost.params(spec) + added
        tokens = torch.randint(spec.vocab_size, (1, 70), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected, found = search(tokens), stock(tokens, use_cache=False).logits
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert_same_greedy(search, stock, tokens)
    return stock


def assert_same_greedy(search: HybridLM, stock: Any, prompt: torch.Tensor) -> None:
    """`generate` of the stock class chooses the 20 tokens after a prompt [B, T] that the search model's steps do."""
    ways: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    told = stock.generate(prompt, attention_mask=torch.ones_like(prompt), **ways)
    state, piece, own = search.init_state(len(prompt), prompt.shape[1] + 20), prompt, []
    for _ in range(20):
        piece = search.extend(piece, state, last_only=True).argmax(-1)
        own.append(piece)
    assert told[:, prompt.shape[1] :].tolist() == torch.cat(own, dim=1).tolist()


def tensor_types(folder: Path) -> dict[str, torch.dtype]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a mapping


def test_the_qwen3_next_recipe_is_qwen3_next(tmp_path: Path) -> None:
    spec = recipe("qwen3-next", 4, n_experts="6", top_k="3")
    config = same_as_stock(spec, "qwen3_next", tmp_path / "out", added=4 * 64).config
    assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (6, 3, 16)
    assert (config.linear_num_key_heads, config.linear_num_value_heads, config.num_key_value_heads) == (4, 8, 1)
    names = tensor_types(tmp_path / "out")  # those of published weights
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" in names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "256 parameters more, which gate the shared experts: zeros" in card
    assert "trust_remote_code" not in card


def test_the_gemma3_recipe_is_gemma3(tmp_path: Path) -> None:
    config = same_as_stock(recipe("gemma3", 6), "gemma3", tmp_path / "out").config
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    thetas = {kind: parameters["rope_theta"] for kind, parameters in config.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert (config.sliding_window, config.query_pre_attn_scalar, config.hidden_activation) == (12, 16, "silu")


GDN = "g: {kind: gated_deltanet, head_dim: 16, expand: 1/2, expand_v: 3/2, value_groups: 2, conv: 3}"
GATED = "a: {kind: attention, head_dim: 16, kv_groups: all, rope_fraction: 1/2, qk_norm: true, gate: element}"
LOCAL = "l: {kind: attention, head_dim: 32, kv_groups: 2, window: 9, rope_theta: 777, qk_norm: true}"
GLOBAL = "g: {kind: attention, head_dim: 32, kv_groups: 2, qk_norm: true}"
FREE = "a: {kind: attention, head_dim: 16, kv_groups: 2}"
NARROW = "w: {kind: attention, head_dim: 32, window: 9, rope_theta: 50000}"
DELTA = "t: {kind: deltanet, head_dim: 16, expand: 1/2, conv: 3, gate: true, neg_eigenvalues: true}"
RETNET = "r: {kind: scalar_decay, variant: retnet, head_dim: 16, expand_v: 3/2}"
SIZES = "head_dim: 16, expand: 1/2"
SCALED = "tie_embeddings: false, residual: scaled"
SANDWICH = "norm_place: sandwich, residual: scaled"

EXPRESSED: dict[str, tuple[str, ModelSpec, int]] = {
    "qwen3_next, one expert a token and none shared": (
        "qwen3_next",
        layout(f"{GDN}, {GATED}", "g a; d e", "e: {kind: moe, n_experts: 5, top_k: 1, route_scale: 2.5}", SCALED),
        64,
    ),
    "qwen3_next, scores as they are": (
        "qwen3_next",
        layout(GATED, "a; e", "e: {kind: moe, n_experts: 4, top_k: 2, n_shared: 2, normalize: false, expand: 1/4}"),
        64,
    ),
    "qwen3_next, dense": ("qwen3_next", layout(f"{GDN}, {GATED}", "a g g", d_model=96), 0),
    "gemma3, untied, residual scaled": ("gemma3", layout(LOCAL, "l l", "", f"{SANDWICH}, tie_embeddings: false"), 0),
    "gemma3 in bfloat16": ("gemma3", layout(f"{LOCAL}, {GLOBAL}", "g l", "", SANDWICH, dtype="bfloat16"), 0),
    "fla, GLA and two kinds of attention": (
        "fla",
        layout(f"g: {{kind: gla, head_dim: 16, expand_k: 1/2, expand_v: 3/2}}, {FREE}, {NARROW}", "g a w", "", SCALED),
        0,
    ),
    "fla, RetNet": ("fla", layout(RETNET, "r r"), 0),
    "fla, DeltaNet": ("fla", layout(DELTA, "t t"), 0),
    "fla, DeltaNet without a gate": ("fla", layout("t: {kind: deltanet, head_dim: 16, expand_v: 3/2}", "t"), 0),
    "fla, Gated DeltaNet in bfloat16": ("fla", layout(f"{GDN}, {FREE}", "g a g", dtype="bfloat16", d_model=96), 0),
    "fla, KDA": ("fla", layout(f"k: {{kind: kda, {SIZES}}}, {FREE}", "k a k"), 2 * 32),
    "fla, attention with normed queries": ("fla", layout(FREE.replace("}", ", qk_norm: true}"), "a a"), 0),
    "fla, Samba": ("fla", recipe("samba", 2, 96), 0),
    "fla, Mamba-2": ("fla", layout("m: {kind: mamba2, head_dim: 16, d_state: 8}", "m m; n n", "n: {kind: none}"), 0),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of width 0
@pytest.mark.parametrize("case", EXPRESSED)
def test_what_a_class_can_say_it_says(case: str, tmp_path: Path) -> None:
    name, spec, added = EXPRESSED[case]
    if name == "fla":
        pytest.importorskip("fla.models")
    same_as_stock(spec, name, tmp_path / "out", added)
    wide = {n for n, dtype in tensor_types(tmp_path / "out").items() if dtype == torch.float32}
    if spec.dtype == "bfloat16" and spec.trunk.residual == "plain":  # what took up a factor, and nothing else
        assert {n.removeprefix("model.") for n in wide} == {"embeddings.weight", "norm.weight"}
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_attention_of_a_hybrid(tmp_path: Path) -> None:
    """Layers with the same settings are one specification of fla's `attn`."""
    pytest.importorskip("fla.models")
    spec = layout(f"g: {{kind: gla, head_dim: 16, expand_k: 1/2, expand_v: 3/2}}, {FREE}, {NARROW}", "a g w a")
    attn = translate(dialect("fla"), spec).config["attn"]
    assert [(group["layers"], group["num_kv_heads"], group["window_size"]) for group in attn] == [
        ([0, 3], 2, None),
        ([2], 2, 9),
    ]


MLA = "m: {kind: mla, head_dim: 16, rope_dim: 8}"
SINK = "a: {kind: attention, head_dim: 16, qk_norm: true, sink: true}"
REFUSED: dict[str, tuple[str, ModelSpec, str]] = {
    "another mixer": (
        "gemma3",
        layout(f"{GLOBAL}, {MLA}", "g m", "", SANDWICH),
        "block 1 (m, mla): Gemma-3 knows attention and sliding-window attention only; expected attention",
    ),
    "a sink": (
        "gemma3",
        layout(SINK, "a", "", SANDWICH),
        "block 0 (a, attention): the attention of Gemma-3 has no sink; expected sink: false",
    ),
    "queries without norms": (
        "gemma3",
        layout(FREE, "a", "", SANDWICH),
        "block 0 (a, attention): Gemma-3 norms queries and keys; expected qk_norm: true",
    ),
    "half of RoPE": (
        "gemma3",
        layout(GLOBAL.replace("}", ", rope_fraction: 1/2}"), "g", "", SANDWICH),
        "block 0 (g, attention): Gemma-3 rotates all features of a head, this block 16; "
        "expected position: rope with rope_fraction: 1",
    ),
    "two windows": (
        "gemma3",
        layout(f"{LOCAL}, {LOCAL.replace('l:', 'm:').replace('9', '8')}", "l l m", "", SANDWICH),
        "block 2 (m, attention): its sliding_window is 8, that of block 0 is 9, and Gemma-3 has one; "
        "expected sliding_window 9 in every such block",
    ),
    "norms elsewhere": (
        "gemma3",
        layout(GLOBAL, "g"),
        "the trunk: Gemma-3 norms what goes into a branch and what comes out, not pre alone; "
        "expected trunk.norm_place: sandwich",
    ),
    "LayerNorm": (
        "qwen3_next",
        layout(GDN, "g", "", "norm: layernorm"),
        "the trunk: Qwen3-Next has RMSNorm, not layernorm; expected trunk.norm: rmsnorm",
    ),
    "no gate": (
        "qwen3_next",
        layout(f"{GDN}, {FREE}", "g a"),
        "block 1 (a, attention): the attention of Qwen3-Next has gate element, not none; expected gate: element",
    ),
    "steps up to 2": (
        "qwen3_next",
        layout(GDN.replace("}", ", neg_eigenvalues: true}"), "g"),
        "block 0 (g, gated_deltanet): Qwen3-Next knows no neg_eigenvalues True; expected neg_eigenvalues: false",
    ),
    "sigmoid routing": (
        "qwen3_next",
        layout(GDN, "g; e", "e: {kind: moe, routing: sigmoid}"),
        'block 0 (e, moe): Qwen3-Next knows no routing sigmoid; expected routing: "softmax"',
    ),
    "another FFN": (
        "qwen3_next",
        layout(GDN, "g g; d e", "e: {kind: mlp}"),
        "block 1 (e, mlp): Qwen3-Next knows no mlp as its FFN; expected swiglu or moe",
    ),
    "no FFN": (
        "qwen3_next",
        layout(GDN, "g; n", "n: {kind: none}"),
        "block 0 (n, none): Qwen3-Next knows no none as its FFN; expected swiglu or moe",
    ),
    "no attention": (
        "qwen3_next",
        layout(GDN, "g g"),
        "the layout: no block has attention, and the cache of Qwen3-Next's class counts the tokens in a layer of "
        "attention; expected attention in one block at least",
    ),
    "two linear mixers": (
        "fla",
        layout(f"{DELTA}, {RETNET}", "t r"),
        "block 1 (r, scalar_decay): fla's DeltaNet knows deltanet and attention only; expected attention",
    ),
    "no such model": (
        "fla",
        layout("s: {kind: scalar_decay, head_dim: 16}", "s"),
        "block 0 (s, scalar_decay): fla has no model of simple_gla; expected variant: retnet",
    ),
    "another width of the heads": (
        "fla",
        layout(f"{DELTA}, a: {{kind: attention, head_dim: 16, expand: 1/2}}", "t a"),
        "block 1 (a, attention): the heads of fla's attention fill d_model, not 0.5 of it; expected expand: 1",
    ),
    "another rank": (
        "fla",
        layout("k: {kind: kda, head_dim: 16, expand_v: 2}", "k"),
        "block 0 (k, kda): the decay of fla's KDA has the rank of its values, 32, ours 16; expected expand_v: 1",
    ),
    "another power": (
        "fla",
        layout("g: {kind: gla, head_dim: 16, gate_normalizer: 8}", "g"),
        "block 0 (g, gla): fla's GLA knows no gate_normalizer 8.0; expected gate_normalizer: 16",
    ),
    "an odd width of the FFN": (
        "fla",
        recipe("samba", 2),
        "block 0 (dense, swiglu): the width of an FFN of fla's Samba is a multiple of 256, not 176; "
        "expected an expand of 256/64",
    ),
    "groups of heads": (
        "fla",
        layout("m: {kind: mamba2, head_dim: 16, n_groups: 2}", "m; n", "n: {kind: none}"),
        "block 0 (m, mamba2): fla's own code, without mamba-ssm, deals groups out to heads in a prompt as it does not "
        "when decoding; expected n_groups: 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_say_is_refused_with_its_block(case: str, tmp_path: Path) -> None:
    name, spec, message = REFUSED[case]
    with pytest.raises(Refused) as caught:
        export_model(spec, tmp_path / "out", name="fine", format=name, weights="init")
    assert str(caught.value) == message
    block = re.match(r"block (\d+)", message)
    assert caught.value.block == (None if block is None else int(block[1]))
    assert list(tmp_path.iterdir()) == []


def test_shared_keys_and_weights_are_refused(tmp_path: Path) -> None:
    text = f"mixers: {{{GLOBAL}}}\nffns: {{d: {{kind: swiglu}}}}\ntrunk: {{{SANDWICH}}}\n"
    text += "layout: {mixer: {pattern: [g]}, ffn: {pattern: [d]}}\n"
    for shared, message in (
        ("share: {kv: {span: 2}}", r"block 1 \(g, attention\): it reads the keys and values of block 0"),
        ("share: {weights: {ffn: d}}", r"block 1 \(d, swiglu\): it shares its ffn weights with block 0"),
    ):
        with pytest.raises(Refused, match=message):
            export_model(resolved(text + shared, 2), tmp_path / "out", name="fine", format="gemma3")
        assert list(tmp_path.iterdir()) == []


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [case for case in EXPRESSED if case.startswith("fla")])
def test_kernels_of_fla(case: str, tmp_path: Path) -> None:
    """Where there is a GPU the export compares them as well."""
    pytest.importorskip("fla.models")
    out = export_model(EXPRESSED[case][1], tmp_path / "out", name="fine", format="fla")
    with_attention = any(block.mixer.kind == "attention" for block in EXPRESSED[case][1].blocks)
    told = "Kernels were not compared: fla's" if with_attention else "With its own kernels on"
    assert told in (out / "README.md").read_text()


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


def test_shares_of_a_width_come_back() -> None:
    """Stock classes compute int(whole * share), which truncates."""
    pairs = [(part, whole) for whole in range(1, 130) for part in range(1, 260)]
    assert not [(part, whole) for part, whole in pairs if int(whole * share(part, whole)) != part]


def test_every_dialect_of_the_table_is_one() -> None:
    for name in DIALECTS:
        made = dialect(name)
        assert (made.name, bool(made.title)) == (name, True)
        assert set(made.names.norms) >= {"mixer_norm"}
