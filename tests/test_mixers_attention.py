"""The attention family beyond its defaults: options, rings, sharing across blocks, block selection, branches."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import pytest
import torch

from archsearch.architecture import Block, ModelSpec, dump, parse_mixer
from archsearch.contract import Site
from archsearch.errors import GraphError
from archsearch.ffns.none import NoFFN
from archsearch.model import build_model
from archsearch.testing import MixerContract

SMALL = {"head_dim": 16}


class TestMoreOptions(MixerContract):
    variants: ClassVar = (
        {"kind": "mla", **SMALL, "rope_dim": 0, "v_head_dim": 24, "q_latent": "1/2", "latent": "3/8"},
        {"kind": "moba", **SMALL, "block_size": 6, "top_k": 2, "kv_groups": "all", "qk_norm": True, "gate": "element"},
        {
            "kind": "parallel",
            "of": [{"kind": "mla", **SMALL}, {"kind": "moba", **SMALL, "block_size": 8, "top_k": 2}],
            "fuse": "concat",
        },
    )


def mixer(kind: str, **options: Any) -> Any:
    return parse_mixer({"kind": kind, **SMALL, **options}).at_context(64)


def language_model(*blocks: Block, d_model: int = 64) -> Any:
    torch.manual_seed(0)
    return build_model(ModelSpec(d_model, 64, 50, tuple(blocks))).eval()


# --- keys and values across blocks ---


SHARED = {
    "attention": (mixer("attention"), mixer("attention", gate="head")),
    "a window on full keys": (mixer("attention", kv_groups=2), mixer("attention", kv_groups=2, window=8)),
    "a window on a ring": (mixer("attention", window=16), mixer("attention", window=5, sink=True)),
    "the same ring": (mixer("attention", window=16), mixer("attention", window=16)),
    "mla with other heads": (mixer("mla"), mixer("mla", head_dim=8, v_head_dim=4, expand=0.5, q_latent=0.25)),
    "moba with another budget": (mixer("moba", block_size=8, top_k=2), mixer("moba", block_size=8, top_k=4)),
}


@pytest.mark.parametrize("split", [[64], [40, 24], [7, *[1] * 40, 10, *[1] * 7]], ids=["prefill", "pieces", "steps"])
@pytest.mark.parametrize("case", SHARED)
@torch.no_grad()
def test_a_model_decodes_with_shared_keys_and_values(case: str, split: list[int]) -> None:
    source, reader = SHARED[case]
    model = language_model(Block(source, NoFFN()), Block(reader, NoFFN(), kv_from=0), Block(reader, NoFFN(), kv_from=0))
    tokens = torch.randint(50, (2, 64))
    state = model.init_state(2, 64)
    assert state.num_bytes() == 2 * source.state_bytes(Site(64), 64, dtype_bytes=4)
    pieces = [model.extend(piece, state) for piece in tokens.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "reader"),
    [
        (mixer("attention", window=8), mixer("attention", window=9)),
        (mixer("attention", window=8), mixer("attention")),
        (mixer("attention"), mixer("attention", kv_groups=2)),
        (mixer("attention"), mixer("attention", position="none")),
        (mixer("attention"), mixer("moba")),
        (mixer("moba", block_size=8), mixer("moba", block_size=4)),
        (mixer("mla"), mixer("mla", latent=0.5)),
        (mixer("mla"), mixer("attention")),
        (mixer("attention"), parse_mixer({"kind": "parallel", "of": [dump(mixer("attention"))] * 2})),
    ],
    ids=lambda spec: spec.kind,
)
def test_what_cannot_be_shared_is_refused(source: Any, reader: Any) -> None:
    with pytest.raises(GraphError, match="cannot reuse the keys and values of block 0"):
        language_model(Block(source, NoFFN()), Block(reader, NoFFN(), kv_from=0))


# --- windows ---


@torch.no_grad()
def test_a_window_of_the_context_is_full_attention() -> None:
    windowed, full = (mixer("attention", window=window).call(Site(64)).build() for window in (64, None))
    full.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 64, 64)
    torch.testing.assert_close(windowed(x), full(x))


def test_spans_follow_the_context() -> None:
    spec = parse_mixer({"kind": "parallel", "of": [{"kind": "attention", "window": "1/4 context"}, {"kind": "moba"}]})
    for context in (64, 4096):
        window, blocks = spec.at_context(context).of
        assert (window.window, blocks.block_size) == (context // 4, context // 16)


# --- MLA ---


def test_mla_counts_deepseek_v3() -> None:
    """A layer of DeepSeek-V3: 187,107,328 weights, 576 numbers per cached token (sizes of 2412.19437)."""
    spec = parse_mixer(
        {
            "kind": "mla",
            "head_dim": 128,
            "rope_dim": 64,
            "expand": "16/7",  # 128 heads
            "latent": "512/7168",
            "q_latent": "1536/7168",
        }
    )
    site = Site(7168)
    assert spec.num_params(site) == 187_107_328
    assert spec.state_bytes(site, 1, dtype_bytes=2) == 576 * 2


# --- MoBA ---


@torch.no_grad()
def test_moba_with_every_block_chosen_is_attention() -> None:
    full = mixer("attention", kv_groups=2).call(Site(64)).build()
    x = torch.randn(2, 63, 64)
    for top_k, same in ((8, True), (100, True), (7, False)):
        sparse = mixer("moba", kv_groups=2, block_size=8, top_k=top_k).call(Site(64)).build()
        sparse.load_state_dict(full.state_dict())
        assert torch.allclose(sparse(x), full(x), atol=1e-6) == same


@torch.no_grad()
def test_moba_keeps_the_means_of_past_blocks_only() -> None:
    module = mixer("moba", block_size=8, top_k=2).call(Site(64)).build()
    state = module.init_state(1, 33, torch.device("cpu"), torch.float32)
    x = torch.randn(1, 33, 64)
    for position in range(33):
        module.step(x[:, position : position + 1], state, position)
        filled = state["mean"].abs().sum((0, 2, 3)) > 0
        assert filled.tolist() == [block < position // 8 for block in range(4)]
    torch.testing.assert_close(state["mean"], state["k"][:, :32].unflatten(1, (4, 8)).mean(2))


def test_moba_decodes_at_the_cost_of_its_budget() -> None:
    spec = mixer("moba", block_size=16, top_k=4)
    site = Site(64)
    attention = [spec.step_flops(site, context) - 2 * spec.matrix_params(site) for context in (64, 640)]
    means = 2 * 64 * 39  # one more product for each of the past blocks
    assert attention == [4 * 64 * 64, 4 * 64 * 64 + means]


# --- parallel ---


BRANCHES = [{"kind": "attention", **SMALL, "window": 8}, {"kind": "mla", **SMALL}]


@torch.no_grad()
def test_parallel_fuses_its_branches() -> None:
    x = torch.randn(2, 20, 64)
    for fuse in ("sum", "mean_norm", "concat"):
        module: Any = mixer_of(fuse).call(Site(64)).build()
        one, two = (branch(x) for branch in module.mixers)
        if fuse == "sum":
            expected = one + two
        elif fuse == "mean_norm":
            expected = sum(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (one, two)) / 2
        else:
            left, right = module.o_proj.weight.chunk(2, dim=1)
            expected = one @ left.T + two @ right.T
        torch.testing.assert_close(module(x), expected)


def mixer_of(fuse: str) -> Any:
    return parse_mixer({"kind": "parallel", "of": BRANCHES, "fuse": fuse})


def test_parallel_survives_json() -> None:
    spec = mixer_of("concat")
    data = json.loads(json.dumps(dump(spec)))
    assert data == {"kind": "parallel", "of": BRANCHES, "fuse": "concat"}
    assert parse_mixer(data) == spec


def test_parallel_costs_are_those_of_its_branches() -> None:
    site, branches = Site(64), [parse_mixer(branch) for branch in BRANCHES]
    for fuse, own_params, own_products in (("sum", 0, 0), ("mean_norm", 128, 0), ("concat", 8192, 8192)):
        spec = mixer_of(fuse)
        assert spec.num_params(site) == sum(b.num_params(site) for b in branches) + own_params
        assert spec.flops(site, 100) == sum(b.flops(site, 100) for b in branches) + 200 * own_products
        assert spec.step_flops(site, 100) == sum(b.step_flops(site, 100) for b in branches) + 2 * own_products
        assert spec.state_bytes(site, 100, 2) == sum(b.state_bytes(site, 100, 2) for b in branches)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ([BRANCHES[0]], "of\n.*found 1 branches; expected at least 2"),
        ([BRANCHES[0], {"kind": "none"}], "of\n.*found a branch of kind 'none'"),
        ([BRANCHES[0], {"kind": "parallel", "of": BRANCHES}], "of\n.*found a branch of kind 'parallel'"),
        ([BRANCHES[0], {"kind": "atention"}], r"of\.1\n.*unknown mixer 'atention'.*Did you mean 'attention'"),
        ([{"kind": "attention", "windw": 3}, BRANCHES[1]], r"of\.0\.windw\n.*Extra inputs are not permitted"),
        (["mla", BRANCHES[0]], r"of\.0\n.*instance of MixerSpec"),
    ],
)
def test_parallel_says_what_is_wrong_and_where(of: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mixer({"kind": "parallel", "of": of})


# --- widths ---


def test_fewer_heads_than_a_group_share_one() -> None:
    narrow, wide = Site(64), Site(256)
    for spec in (mixer("attention", kv_groups=8), mixer("moba", kv_groups=8)):
        spec.check(narrow)
        assert (spec.n_kv_heads(narrow), spec.n_kv_heads(wide)) == (1, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (mixer("attention", head_dim=48), "head_dim 48 does not divide the width 64 (expand 1 x d_model 64); write"),
        (
            mixer("attention", kv_groups=3),
            "kv_groups 3 does not divide the 4 heads of d_model 64; write a divisor of 4",
        ),
        (
            mixer("attention", rope_fraction=0.05),
            "rope_fraction 0.05 of head_dim 16 rotates nothing; write at least 0.125",
        ),
        (mixer("mla", expand=0.1), "head_dim 16 does not divide the width 6 (expand 0.1 x d_model 64)"),
        (mixer("moba", kv_groups=3), "kv_groups 3 does not divide"),
        (
            parse_mixer({"kind": "parallel", "of": [BRANCHES[0], {"kind": "mla", "head_dim": 48}]}),
            "branch 1 (mla): head_dim 48 does not divide",
        ),
    ],
)
def test_check_says_what_does_not_divide(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        spec.check(Site(64))
