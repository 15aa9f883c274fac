"""What a dialect cannot say is refused with the block that stops it, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dialect_models import DELTA, FREE, GDN, GLOBAL, LOCAL, RETNET, SANDWICH, layout, recipe, resolved

from archsearch.architecture import ModelSpec
from archsearch.export import export_model
from archsearch.export.dialects.base import Refused

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
