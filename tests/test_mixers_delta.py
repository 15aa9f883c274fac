"""Delta-rule mixers beyond their defaults: the contract with every option, initial values, sizes, what is refused."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from archsearch.architecture import Block, ModelSpec, parse_mixer
from archsearch.contract import Site
from archsearch.ffns.none import NoFFN
from archsearch.model import build_model, width_multipliers
from archsearch.testing import MixerContract

SMALL = {"head_dim": 16}
KINDS = ("deltanet", "gated_deltanet", "kda")


class TestDeltaFamily(MixerContract):
    variants: ClassVar = (
        {"kind": "deltanet", **SMALL},
        {"kind": "deltanet", **SMALL, "expand": 0.5, "expand_v": 1.5, "gate": True, "neg_eigenvalues": True, "conv": 1},
        {"kind": "gated_deltanet", **SMALL, "expand": "3/4"},
        {"kind": "gated_deltanet", **SMALL, "expand_v": 1, "value_groups": 2, "neg_eigenvalues": True, "conv": 3},
        {"kind": "kda", **SMALL},
        {"kind": "kda", **SMALL, "expand": 1.25, "expand_v": 0.5, "conv": 2},
    )


def mixer(kind: str, **options: Any) -> Any:
    return parse_mixer({"kind": kind, **options})


def built(spec: Any, d_model: int = 64) -> Any:
    """The mixer of an initialised model."""
    model: Any = build_model(ModelSpec(d_model, 64, 50, (Block(spec, NoFFN()),)))
    return model.blocks[0].mixer


# --- initial values, ranges ---


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gated_deltanet", "kda"])
def test_decays_start_with_many_time_scales(kind: str) -> None:
    module = built(mixer(kind, head_dim=4), d_model=512)
    dt, rates = F.softplus(module.dt_bias), module.A_log.exp()
    assert dt.min() >= 0.9e-3
    assert dt.max() <= 1.1e-1
    assert abs(dt.log().mean() - torch.tensor([1e-3, 1e-1]).log().mean()) < 0.3  # log-uniform
    assert 1 <= rates.min() < 2
    assert 15 < rates.max() <= 16


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gated_deltanet", "kda"])
def test_decays_lie_between_0_and_1_in_float32(kind: str, dtype: torch.dtype) -> None:
    module = built(mixer(kind, **SMALL)).to(dtype)
    x = 30 * torch.randn(1, 100, 64, dtype=dtype)
    g = module._operands(module.qkv_proj(x), x)[4]
    assert g.dtype == torch.float32
    assert (g <= 0).all()
    assert g.exp().std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_have_unit_length(kind: str, dtype: torch.dtype) -> None:
    """Computed in float32; rounded to bfloat16, a key of 16 features stays within 2^-8 of it."""
    module = built(mixer(kind, **SMALL)).to(dtype)
    x = torch.randn(1, 100, 64, dtype=dtype)
    q, k, *_ = module._operands(module.qkv_proj(x), x)
    for unit in (q, k):
        assert unit.dtype == dtype
        atol = 1e-4 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(unit.float().norm(dim=-1), torch.ones(unit.shape[:3]), rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["deltanet", "gated_deltanet"])
def test_negative_eigenvalues_double_the_steps(kind: str) -> None:
    x = 30 * torch.randn(1, 100, 64)
    betas = []
    for option in (False, True):
        module = built(mixer(kind, **SMALL, neg_eigenvalues=option))
        betas.append(module._operands(module.qkv_proj(x), x)[3])
    torch.testing.assert_close(betas[1], 2 * betas[0])
    assert betas[0].max() > 0.99


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_float32_and_nothing_of_a_prefill_is_kept(kind: str) -> None:
    module = built(mixer(kind, **SMALL)).bfloat16()
    state = module.init_state(2, 300, torch.device("cpu"), torch.bfloat16)
    shapes = {name: value.shape for name, value in state.items()}
    for position, n in ((0, 256), (256, 1), (257, 7)):
        (module.step if n == 1 else module.extend)(torch.randn(2, n, 64).bfloat16(), state, position)
        assert {name: value.shape for name, value in state.items()} == shapes
        for name, value in state.items():
            assert value.dtype == (torch.float32 if name == "s" else torch.bfloat16)
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


# --- sizes ---


def test_published_sizes_in_units_of_d_model_squared() -> None:
    """What a projection to n heads, a convolution, a norm and the decay add is less than 2 % at this width."""
    d = 4096
    for spec, weights in (
        (mixer("deltanet"), 4.0),
        (mixer("gated_deltanet", head_dim=128, expand="3/4"), 6.0),
        (mixer("gated_deltanet", head_dim=128, expand_v=1, value_groups=2), 8.0),
        (mixer("kda", head_dim=128), 4 + 4 * 128 / d),
    ):
        assert 1 <= spec.num_params(Site(d)) / (weights * d**2) < 1.02


def test_qwen3_next_and_kimi_linear_layers_are_counted() -> None:
    """Weights of Qwen3NextGatedDeltaNet and KimiLinearDeltaAttention with the released configurations."""
    qwen = mixer("gated_deltanet", head_dim=128, expand_v=1, value_groups=2)
    assert qwen.num_params(Site(2048)) == 2048 * (12288 + 64 + 4096) + 4 * 8192 + 2 * 32 + 128
    kimi = mixer("kda", head_dim=128, expand="16/9")
    low_rank = 2 * 128 * (2304 + 4096)
    assert kimi.num_params(Site(2304)) == 2304 * (4 * 4096 + 32) + low_rank + 4 * 12288 + 32 + 4096 + 128


def test_states_do_not_grow_with_the_context() -> None:
    for spec, site, mib in (
        (mixer("deltanet", head_dim=128, conv=1), Site(2048), 1.0),
        (mixer("gated_deltanet", head_dim=128, expand_v=1, value_groups=2, conv=1), Site(2048), 2.0),
        (mixer("kda", head_dim=128, expand="16/9", conv=1), Site(2304), 2.0),
    ):
        assert spec.state_bytes(site, 8, 2) == spec.state_bytes(site, 2**20, 2) == mib * 2**20
        assert spec.step_flops(site, 8) == spec.step_flops(site, 2**20)
        assert spec.flops(site, 2048) == 2048 * spec.flops(site, 1)


def test_flops_of_the_rule_are_those_of_the_paper() -> None:
    """C (6 K + 4 V) + C^2 + 6 K V a token and head: here 64 tokens, 2 heads of 32 keys and 64 values."""
    spec, site = mixer("gated_deltanet", head_dim=32), Site(64)
    matrices = 64 * (2 * 64 + 3 * 128 + 2 * 2)
    assert spec.flops(site, 64) == 64 * (2 * matrices + 2 * (64 * (6 * 32 + 4 * 64) + 64**2 + 6 * 32 * 64))
    assert spec.step_flops(site, 1) == 2 * matrices + 2 * 6 * 32 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rates_follow_the_width_only_where_the_fan_in_does(kind: str) -> None:
    factors = width_multipliers(ModelSpec(128, 64, 50, (Block(mixer(kind, **SMALL), NoFFN()),)))
    prefix = "blocks.0.mixer."
    grows = {name.removeprefix(prefix) for name, f in factors.items() if name.startswith(prefix) and f != 1}
    always = {"qkv_proj.weight", "beta_proj.weight", "o_proj.weight"}
    assert grows == always | {
        "deltanet": set(),
        "gated_deltanet": {"decay_proj.weight", "gate_proj.weight"},
        "kda": {"f_a_proj.weight", "g_a_proj.weight"},
    }.get(kind, set())


# --- what is refused ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "head_dim 64 does not divide the width 96 (expand 1 x d_model 96)"),
        ({"head_dim": 16, "expand": "3/4"}, "head_dim 16 does not divide the width 72 (expand 0.75 x d_model 96)"),
        (
            {"head_dim": 16, "expand_v": 0.7},
            "expand_v 0.7 x head_dim 16 is not a whole number of value features; write a multiple of 0.0625",
        ),
        ({"head_dim": 16, "expand_v": 1e-9}, "is not a whole number of value features"),
        ({"head_dim": 24, "expand_v": "2/3"}, None),
        ({"head_dim": 32}, None),
    ],
    ids=str,
)
def test_widths_must_divide(kind: str, options: dict[str, Any], message: str | None) -> None:
    spec = mixer(kind, **options)
    if message is None:
        spec.check(Site(96))
        spec.call(Site(96)).build()
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            spec.check(Site(96))
