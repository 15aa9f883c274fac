"""Dialects: stock classes of transformers and fla load the folder and compute what was searched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dialect_models import (
    DELTA,
    FREE,
    GATED,
    GDN,
    GLOBAL,
    LOCAL,
    NARROW,
    RETNET,
    SANDWICH,
    SCALED,
    SIZES,
    layout,
    recipe,
    same_as_stock,
    tensor_types,
)

from archsearch.architecture import ModelSpec
from archsearch.export import export_model
from archsearch.export.dialects import DIALECTS, dialect
from archsearch.export.dialects.base import share
from archsearch.export.dialects.translate import translate


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


def test_shares_of_a_width_come_back() -> None:
    """Stock classes compute int(whole * share), which truncates."""
    pairs = [(part, whole) for whole in range(1, 130) for part in range(1, 260)]
    assert not [(part, whole) for part, whole in pairs if int(whole * share(part, whole)) != part]


def test_every_dialect_of_the_table_is_one() -> None:
    for name in DIALECTS:
        made = dialect(name)
        assert (made.name, bool(made.title)) == (name, True)
        assert set(made.names.norms) >= {"mixer_norm"}
