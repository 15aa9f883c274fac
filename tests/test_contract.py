"""Every mixer and FFN of the tables keeps the contract of archsearch.testing."""

from __future__ import annotations

from typing import Any

import pytest

from archsearch.contract import Site
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.testing import FFNContract, MixerContract

SMALL = {"head_dim": 16}  # several heads at the tests' width

# Options worth a test of their own; a kind that is not listed is tested with its defaults.
MIXER_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {},
        {**SMALL, "kv_groups": 2, "qk_norm": True, "gate": "head", "rope_fraction": 0.5},
        {**SMALL, "kv_groups": "all", "window": 16, "sink": True},
        {**SMALL, "window": "1/4 context", "position": "none", "gate": "element"},
    ],
    "mla": [
        {},
        {**SMALL, "v_head_dim": 32, "rope_dim": 8, "q_latent": 0.5},
        {**SMALL, "rope_dim": 0},
    ],
    "moba": [
        {},  # a context of 64 tokens makes blocks of 4
        {**SMALL, "block_size": 16, "top_k": 2, "kv_groups": 2, "qk_norm": True},
        {**SMALL, "block_size": 16, "top_k": 1, "position": "none"},
    ],
    "scalar_decay": [
        {},
        {**SMALL, "conv": 4},
        {**SMALL, "variant": "retnet"},
        {**SMALL, "variant": "lightning"},
    ],
    "gla": [{}, {**SMALL, "expand_k": 1, "gate_rank": 8}],
    "mamba": [{}, {"expand": 1, "d_state": 8, "conv": 1, "inner_norm": True}],
    "mamba2": [{}, {**SMALL, "d_state": 32, "n_groups": 2, "conv": 3}],
    "deltanet": [{}, {**SMALL, "gate": True, "neg_eigenvalues": True, "expand_v": 2}, {**SMALL, "conv": 1}],
    "gated_deltanet": [{}, {**SMALL, "expand_v": 1, "value_groups": 2, "neg_eigenvalues": True, "conv": 2}],
    "kda": [{}, {**SMALL, "expand_v": 2, "conv": 2}],
    "short_conv": [{}, {"kernel": 1}, {"kernel": 5}],
    "parallel": [
        {"of": [{"kind": "attention", **SMALL, "window": 16}, {"kind": "mamba2", **SMALL, "d_state": 16}], "fuse": fuse}
        for fuse in ("sum", "mean_norm", "concat")
    ],
}
FFN_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "swiglu": [{}, {"expand": 2}],
    "mlp": [{}, {"activation": "relu2", "expand": 2}],
    "moe": [
        {},
        {"n_experts": 4, "top_k": 1, "n_shared": 1},
        {"n_experts": 6, "top_k": 3, "expand": 0.5, "routing": "sigmoid", "n_shared": 2, "route_scale": 2.5},
        {"n_experts": 4, "top_k": 2, "expand": 0.5, "normalize": False},
    ],
}


def table(names: list[str], variants: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every kind with each of its option sets."""
    return [{"kind": kind, **options} for kind in names if kind != "none" for options in variants.get(kind, [{}])]


class TestMixers(MixerContract):
    variants = table(MIXERS.names(), MIXER_VARIANTS)


class TestFFNs(FFNContract):
    variants = table(FFNS.names(), FFN_VARIANTS)


def test_variants_are_of_known_kinds() -> None:
    assert set(MIXER_VARIANTS) <= set(MIXERS.names())
    assert set(FFN_VARIANTS) <= set(FFNS.names())


@pytest.mark.parametrize("registry", [MIXERS, FFNS], ids=lambda registry: registry.what)
def test_none_costs_nothing(registry: Any) -> None:
    spec, site = registry.load("none")(), Site(64)
    assert spec.num_params(site) == spec.flops(site, 100) == 0
    with pytest.raises(AssertionError, match="builds no"):
        spec.call(site)
