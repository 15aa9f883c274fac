"""Jamba, LFM2 and Falcon-H1 as transformers has them: what their own classes compute is what was searched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect_models import assert_same_greedy, recipe, resolved
from safetensors import safe_open

from archsearch import cost
from archsearch.architecture import ModelSpec
from archsearch.errors import ExportError
from archsearch.export import export_model
from archsearch.export.dialects import lfm2_moe
from archsearch.model import HybridLM, build_model
from archsearch.modules.moe import MoE

STOCK = {
    "jamba": "JambaForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
}


def shaken(spec: ModelSpec) -> HybridLM:
    """A model in which no bias is 0 and no norm 1, those of routers included: each tensor has to be in its place."""
    model = build_model(spec, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model


def same_as_stock(spec: ModelSpec, dialect: str, folder: Path) -> dict[str, Any]:
    """Export, load with AutoModelForCausalLM, compare; returns config.json."""
    from transformers import AutoModelForCausalLM

    search = shaken(spec)
    export_model(spec, folder, weights=search.state_dict(), name="tiny", format=dialect)
    assert not list(folder.glob("*.py"))
    stock: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(stock).__name__ == STOCK[dialect]
    assert type(stock).__module__.startswith("transformers.models.")
    assert sum(p.numel() for p in stock.parameters()) == cost.params(spec)
    tokens = torch.randint(spec.vocab_size, (2, 70), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = search(tokens), stock(tokens).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert_same_greedy(search, stock, tokens)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_the_jamba_recipe_is_jamba(tmp_path: Path) -> None:
    config = same_as_stock(recipe("jamba", 8, n_experts="6"), "jamba", tmp_path / "out")
    places = [config[f"{what}_layer_{part}"] for what in ("attn", "expert") for part in ("period", "offset")]
    assert places == [5, 4, 2, 1]  # of eight blocks; the shortest period that says it
    assert (config["num_experts"], config["num_experts_per_tok"], config["intermediate_size"]) == (6, 2, 224)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:  # the names of published weights
        assert "model.layers.1.feed_forward.experts.5.gate_proj.weight" in file.keys()  # noqa: SIM118 - no mapping


def test_the_lfm2_recipe_is_lfm2(tmp_path: Path) -> None:
    config = same_as_stock(recipe("lfm2", 6), "lfm2", tmp_path / "out")
    assert config["layer_types"] == ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
    assert (config["intermediate_size"], config["block_auto_adjust_ff_dim"]) == (256, False)
    assert config["rope_parameters"]["rope_theta"] == 1e6


def test_the_falcon_h1_recipe_is_falcon_h1(tmp_path: Path) -> None:
    config = same_as_stock(recipe("falcon-h1", 3), "falcon_h1", tmp_path / "out")
    assert (config["embedding_multiplier"], config["lm_head_multiplier"]) == (50.0, 1.0)
    assert (config["mamba_rms_norm"], config["mamba_norm_before_gate"]) == (True, False)
    assert (config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]) == (16, 2, 1)


def layout(mixers: str, ffns: str, of_blocks: str, ffn_of_blocks: str, trunk: str = "") -> ModelSpec:
    """A model whose blocks are named one by one, `m m f m` with `d e d e`."""
    parts = {"mixers": mixers, "ffns": ffns, "trunk": trunk}
    places = [f"{role}: {{blocks: [{', '.join(names.split())}]}}" for role, names in
              (("mixer", of_blocks), ("ffn", ffn_of_blocks))]  # fmt: skip
    lines = [f"{name}: {{{content}}}" for name, content in parts.items()]
    return resolved("\n".join([*lines, f"layout: {{{', '.join(places)}}}"]), len(of_blocks.split()))


MAMBA = "m: {kind: mamba, expand: 1, d_state: 4, conv: 3, dt_rank: 5, inner_norm: true}"
FREE = "f: {kind: attention, head_dim: 16, expand: 1/2, kv_groups: 2, position: none}"
CONV = "c: {kind: short_conv, kernel: 4}"
NORMED = "f: {kind: attention, head_dim: 8, expand: 1/2, kv_groups: all, rope_theta: 500, qk_norm: true}"
SSM = "s: {kind: mamba2, head_dim: 8, expand: 3/4, d_state: 12, n_groups: 2, conv: 2}"
ROTATED = "r: {kind: attention, head_dim: 32, expand: 2, kv_groups: 2, rope_theta: 20000}"
BOTH = f"{SSM}, {ROTATED}, p: {{kind: parallel, fuse: sum, of: [r, s]}}"
DENSE = "d: {kind: swiglu, expand: 1}"
SCALED = "tie_embeddings: false, residual: scaled"
TIED = "tie_embeddings: true, residual: scaled"


def moe(**options: Any) -> str:
    given = {"n_experts": 5, "expand": 1, **options}
    return "e: {kind: moe, " + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"


EXPRESSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "jamba of attention, one expert a token": (
        "jamba",
        (FREE, moe(top_k=1, route_scale=2.5), "f f", "e e", SCALED),
    ),
    "jamba with one block of each": (
        "jamba",
        (f"{MAMBA}, {FREE}", f"{DENSE}, {moe(normalize='false', z_loss=0)}", "m f m", "d e d", TIED),
    ),
    "jamba without experts": ("jamba", (f"{MAMBA}, {FREE}", DENSE, "f m f m", "d d d d")),
    "lfm2 of attention": ("lfm2", (NORMED, DENSE, "f f", "d d", TIED)),
    "lfm2 with four taps": ("lfm2", (f"{CONV}, {NORMED}", DENSE, "f c c", "d d d", SCALED)),
    "lfm2 with experts": (
        "lfm2_moe",
        (
            f"{CONV}, {NORMED}",
            f"{DENSE}, {moe(top_k=2, expand='1/2', routing='sigmoid', normalize='false', route_scale=1.5)}",
            "c f c", "d e e", SCALED,
        ),
    ),
    "lfm2 with weights that sum to nearly one": (
        "lfm2_moe",
        (
            f"{CONV}, {NORMED}",
            f"{DENSE}, {moe(top_k=3, routing='sigmoid', norm_eps='1e-6', route_scale=1.5)}",
            "c f", "d e", SCALED,
        ),
    ),
    "lfm2 with one expert a token": (
        "lfm2_moe",
        (f"{CONV}, {NORMED}", moe(top_k=1, routing="sigmoid"), "c f", "e e"),
    ),
    "falcon_h1 with groups": ("falcon_h1", (BOTH, DENSE, "p p", "d d", SCALED)),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPRESSED)
def test_what_a_class_can_say_it_says(case: str, tmp_path: Path) -> None:
    dialect, described = EXPRESSED[case]
    same_as_stock(layout(*described), dialect, tmp_path / "out")


def test_the_sum_that_lfm2_divides_by_has_its_eps() -> None:
    """Where all scores are small it decides: the stock block and ours on the same weights, logits down to -20."""
    from transformers import Lfm2MoeConfig
    from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeSparseMoeBlock

    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "hidden_size": 32}
    stock = Lfm2MoeSparseMoeBlock(Lfm2MoeConfig(**sizes, norm_topk_prob=True, routed_scaling_factor=1.5)).eval()
    options = {"n_experts": 3, "top_k": 2, "routing": "sigmoid", "route_scale": 1.5}
    x = 0.01 * torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0))
    x[..., 0] = torch.linspace(0, 20, 40)  # of which the router takes the negative
    difference = {}
    with torch.no_grad():
        for eps in (1e-6, 0.0):
            torch.manual_seed(1)
            module = MoE(32, 16, **options, norm_eps=eps).eval()
            module.router.weight[:, 0] = -1
            module.bias.normal_()
            tensors = lfm2_moe._tensors(dict(module.state_dict()))
            stock.load_state_dict({name.removeprefix("feed_forward."): t for name, t in tensors.items()})
            expected = stock(x)
            difference[eps] = float((module(x) - expected).abs().max() / expected.abs().max())
    assert difference[1e-6] < 1e-6
    assert difference[0.0] > 0.1


# --- what cannot be said ---

PLAIN = "f: {kind: attention, head_dim: 16}"
HALF = "r: {kind: attention, head_dim: 16, rope_fraction: 1/2}"
GATED = "r: {kind: attention, head_dim: 16, gate: head}"
WINDOW = "f: {kind: attention, head_dim: 16, qk_norm: true, window: 8}"
WIDER = "g: {kind: attention, head_dim: 16, expand: 1/2, position: none}"
MEAN = "p: {kind: parallel, fuse: mean_norm, of: [s, r]}"
SUM = "p: {kind: parallel, fuse: sum, of: [s, r]}"
UNNORMED = "m: {kind: mamba, expand: 1}"
NARROW = "m: {kind: mamba, expand: 3/2, inner_norm: true}"
SIGMOID = "routing: sigmoid, normalize: false"
REFUSED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "period": (
        "jamba",
        (f"{MAMBA}, {FREE}", DENSE, "m f m f m m f", "d d d d d d d"),
        "block 5 (m, mamba): Jamba says by one period and one offset where attention stands, and blocks 1, 3, 6 "
        "follow none; expected attention here (attn_layer_period 2 and attn_layer_offset 1, as blocks 1 and 3 have "
        "it)",
    ),
    "period of experts": (
        "jamba",
        (f"{MAMBA}, {FREE}", f"{DENSE}, {moe(top_k=1)}", "f m m m", "e e d d"),
        "block 2 (d, swiglu): Jamba says by one period and one offset where moe stands, and blocks 0, 1 follow "
        "none; expected moe here (expert_layer_period 1 and expert_layer_offset 0, as blocks 0 and 1 have it)",
    ),
    "positions": (
        "jamba",
        (f"{MAMBA}, {PLAIN}", DENSE, "m f", "d d"),
        "block 1 (f, attention): attention of Jamba has no positions; expected position: none",
    ),
    "inner norms": (
        "jamba",
        (f"{UNNORMED}, {FREE}", DENSE, "f m", "d d"),
        "block 1 (m, mamba): Jamba norms dt, B and C; expected inner_norm: true",
    ),
    "broken expand": (
        "jamba",
        (f"{NARROW}, {FREE}", DENSE, "f m", "d d"),
        "block 1 (m, mamba): Jamba's mamba_expand is an integer, not 1.5; expected expand: 1 or 2, say",
    ),
    "another mixer": (
        "jamba",
        (f"{MAMBA}, {CONV}", DENSE, "m c", "d d"),
        "block 1 (c, short_conv): the mixers of Jamba are mamba and attention, not short_conv; expected kind: mamba"
        " or attention",
    ),
    "no attention": (
        "jamba",
        (MAMBA, DENSE, "m m", "d d"),
        "the layout: no block has attention, and the cache of Jamba's class counts the tokens in a layer of "
        "attention; expected attention in one block at least",
    ),
    "two widths": (
        "jamba",
        (f"{MAMBA}, {FREE}", f"{DENSE}, {moe(top_k=1, expand=2)}", "f m", "d e"),
        "block 1 (e, moe): its intermediate_size is 128, that of block 0 is 64,",
    ),
    "two kinds of heads": (
        "jamba",
        (f"{FREE}, {WIDER}", DENSE, "f g", "d d"),
        "block 1 (g, attention): its num_key_value_heads is 2, that of block 0 is 1,",
    ),
    "renormalised": (
        "jamba",
        (FREE, moe(), "f", "e"),
        "block 0 (e, moe): Jamba weighs each expert with its own probability; here the 2 weights sum to one; "
        "expected normalize: false, or top_k: 1",
    ),
    "sigmoid": (
        "jamba",
        (FREE, moe(routing="sigmoid"), "f", "e"),
        "block 0 (e, moe): Jamba's router is a softmax, not a sigmoid; expected routing: softmax",
    ),
    "shared experts": (
        "jamba",
        (FREE, moe(top_k=1, n_shared=1), "f", "e"),
        "block 0 (e, moe): Jamba knows no n_shared",
    ),
    "one expert": (
        "jamba",
        (FREE, moe(n_experts=1, top_k=1), "f", "e"),
        "block 0 (e, moe): Jamba has no router for a single expert; expected n_experts: 2 or more, or kind: swiglu",
    ),
    "another ffn": (
        "jamba",
        (FREE, "d: {kind: mlp}", "f", "d"),
        "block 0 (d, mlp): ",
    ),
    "no norm of queries": (
        "lfm2",
        (f"{CONV}, {PLAIN}", DENSE, "c f", "d d"),
        "block 1 (f, attention): LFM2 norms queries and keys; expected qk_norm: true",
    ),
    "window": (
        "lfm2",
        (f"{CONV}, {WINDOW}", DENSE, "c f", "d d"),
        "block 1 (f, attention): LFM2 knows no window",
    ),
    "experts": (
        "lfm2",
        (NORMED, moe(), "f", "e"),
        "block 0 (e, moe): the FFN of LFM2 is a SwiGLU, not moe; expected kind: swiglu",
    ),
    "no ffn": (
        "lfm2",
        (NORMED, "d: {kind: none}", "f", "d"),
        "block 0 (d, none): the FFN of LFM2 is a SwiGLU, not none; expected kind: swiglu",
    ),
    "two tap counts": (
        "lfm2",
        (f"{CONV}, {NORMED}, b: {{kind: short_conv}}", DENSE, "f c b", "d d d"),
        "block 2 (b, short_conv): its conv_L_cache is 3, that of block 1 is 4,",
    ),
    "dense last": (
        "lfm2_moe",
        (NORMED, f"{DENSE}, {moe(top_k=1, routing='sigmoid')}", "f f", "e d"),
        "block 1 (d, swiglu): LFM2-MoE has its dense blocks before those with experts; expected kind: moe",
    ),
    "softmax": (
        "lfm2_moe",
        (NORMED, moe(), "f", "e"),
        "block 0 (e, moe): the router of LFM2-MoE is a sigmoid, not a softmax; expected routing: sigmoid",
    ),
    "sum of weights": (
        "lfm2_moe",
        (NORMED, moe(routing="sigmoid"), "f", "e"),
        "block 0 (e, moe): LFM2-MoE adds 1e-6 to the sum that it divides its 2 weights by, not 0; "
        "expected norm_eps: 1e-6 (or normalize: false, or top_k: 1)",
    ),
    "one mixer": (
        "falcon_h1",
        (f"{BOTH}, {PLAIN}", DENSE, "p f", "d d"),
        "block 1 (f, attention): every block of Falcon-H1 has a Mamba-2 and an attention side by side; expected "
        "kind: parallel, fuse: sum, of one mamba2 and one attention",
    ),
    "mean of both": (
        "falcon_h1",
        (f"{SSM}, {ROTATED}, {MEAN}", DENSE, "p", "d"),
        "block 0 (p, parallel): Falcon-H1 sums a Mamba-2 and an attention, this is mean_norm of mamba2, attention; "
        "expected kind: parallel, fuse: sum, of one mamba2 and one attention",
    ),
    "half rotated": (
        "falcon_h1",
        (f"{SSM}, {HALF}, {SUM}", DENSE, "p", "d"),
        "block 0 (p, attention): Falcon-H1 rotates all features of a head, this block 8 of 16; expected "
        "rope_fraction: 1 and an even head_dim",
    ),
    "gate": (
        "falcon_h1",
        (f"{SSM}, {GATED}, {SUM}", DENSE, "p", "d"),
        "block 0 (p, attention): Falcon-H1 knows no gate",
    ),
    "relu": (
        "falcon_h1",
        (BOTH, "d: {kind: mlp, activation: relu2}", "p", "d"),
        "block 0 (d, mlp): ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_class_cannot_say_is_refused(case: str, tmp_path: Path) -> None:
    dialect, described, message = REFUSED[case]
    spec = layout(*described)
    with pytest.raises(ExportError, match=f"^{re.escape(message)}"):
        export_model(spec, tmp_path / "out", name="tiny", format=dialect)
    assert not list(tmp_path.iterdir())
