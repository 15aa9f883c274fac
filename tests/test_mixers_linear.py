"""Linear attention and state space mixers beyond their defaults: decays, initial values, sizes, what is refused."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from archsearch.architecture import Block, ModelSpec, parse_mixer
from archsearch.contract import Site
from archsearch.ffns.none import NoFFN
from archsearch.model import build_model
from archsearch.testing import MixerContract

SMALL = {"head_dim": 16}


class TestLinearFamily(MixerContract):
    variants: ClassVar = (
        {"kind": "scalar_decay", "variant": "retnet", **SMALL, "expand": 0.5, "expand_v": 0.75, "conv": 2},
        {"kind": "scalar_decay", "variant": "lightning", "head_dim": 8, "expand": 2, "expand_v": 0.5, "conv": 4},
        {"kind": "scalar_decay", **SMALL, "expand_v": 2, "gate_normalizer": 1},
        {"kind": "gla", "head_dim": 8, "expand_v": 0.5, "gate_normalizer": 1, "gate_rank": 3},
        {"kind": "mamba", "expand": 0.5, "dt_rank": 1, "d_state": 1},
        {"kind": "mamba2", "head_dim": 8, "expand": 1.5, "d_state": 24, "n_groups": 3, "conv": 1},
    )


def mixer(kind: str, **options: Any) -> Any:
    return parse_mixer({"kind": kind, **options})


def built(spec: Any, d_model: int = 64, n_blocks: int = 1) -> Any:
    """The mixer of the last block of an initialised model."""
    model: Any = build_model(ModelSpec(d_model, 64, 50, (Block(spec, NoFFN()),) * n_blocks))
    return model.blocks[-1].mixer


# --- decays ---


def measured_decays(module: Any) -> Tensor:
    """Factor by which each head forgets at a step, read off its state."""
    state = module.init_state(1, 2, torch.device("cpu"), torch.float32)
    before = torch.ones_like(state["s"])
    state["s"] = before.clone()
    with torch.no_grad():
        module.step(torch.zeros(1, 1, 64), state, 0)  # no input, so nothing is written
    return state["s"][0, :, 0, 0]


def test_retnet_decays() -> None:
    expected = [1 - 2.0**-5, 1 - 2.0**-6, 1 - 2.0**-7, 1 - 2.0**-8]
    torch.testing.assert_close(
        measured_decays(built(mixer("scalar_decay", variant="retnet", **SMALL))).tolist(), expected
    )


@pytest.mark.parametrize(("layer", "depth"), [(0, 1 + 1e-5), (1, 2 / 3 + 1e-5), (3, 1e-5)])
def test_lightning_decays_are_minimax_slopes(layer: int, depth: float) -> None:
    """Head h of layer l forgets exp(-2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5)); the last layer hardly at all."""
    module: Any = mixer("scalar_decay", variant="lightning", **SMALL).call(Site(64, layer, 4)).build()
    expected = torch.exp(-depth * torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))
    torch.testing.assert_close(measured_decays(module), expected, rtol=0, atol=1e-6)


def test_data_dependent_decays_lie_between_0_and_1() -> None:
    x = 30 * torch.randn(1, 100, 64)
    for spec in (mixer("scalar_decay", **SMALL), mixer("gla", **SMALL)):
        module = built(spec)
        g = module._log_decay(x) if spec.kind == "scalar_decay" else module._heads(x)[3]
        assert g.dtype == torch.float32
        assert (g <= 0).all()
        assert g.exp().std() > 0.1


# --- initial values ---


def steps_and_rates(module: Any) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.softplus(module.dt_bias), module.A_log.exp()


@torch.no_grad()
def test_mamba_starts_with_many_time_scales() -> None:
    dt, rates = steps_and_rates(built(mixer("mamba"), d_model=512))
    assert dt.min() >= 0.9e-3
    assert dt.max() <= 1.1e-1
    assert abs(dt.log().mean() - torch.tensor([1e-3, 1e-1]).log().mean()) < 0.2  # log-uniform
    torch.testing.assert_close(rates, torch.arange(1.0, 17).expand(1024, 16))


@torch.no_grad()
def test_mamba2_starts_with_many_time_scales() -> None:
    dt, rates = steps_and_rates(built(mixer("mamba2", head_dim=4, d_state=4), d_model=512))
    assert dt.min() >= 0.9e-3
    assert dt.max() <= 1.1e-1
    assert abs(dt.log().mean() - torch.tensor([1e-3, 1e-1]).log().mean()) < 0.3
    assert 1 <= rates.min() < 2
    assert 10 < rates.max() <= 16


# --- sizes ---


@pytest.mark.parametrize(
    ("kind", "expected"), [("mamba", 3_770_880), ("mamba2", 3_764_552)], ids=["mamba-130m", "mamba2-130m"]
)
def test_the_released_mambas_are_counted(kind: str, expected: int) -> None:
    """24 layers of this size (and a norm each) make 129,135,360 and 128,989,632 with the embedding."""
    assert mixer(kind).num_params(Site(768)) == expected


def test_gla_has_as_many_weights_as_attention() -> None:
    """4 d^2 (2312.06635, section 4.4), but for the low-rank decay, its bias and the norm."""
    assert mixer("gla").num_params(Site(1024)) == 4 * 1024**2 + 16 * (1024 + 512) + 512 + 128


def test_states_do_not_grow_with_the_context() -> None:
    site = Site(2048)
    for spec, mib in (
        (mixer("scalar_decay", variant="lightning", head_dim=128), 1.0),
        (mixer("gla", head_dim=256), 2.0),
        (mixer("mamba2", conv=1), 2.0),
        (mixer("mamba", conv=1), 0.25),
    ):
        assert spec.state_bytes(site, 8, 2) == spec.state_bytes(site, 2**20, 2) == mib * 2**20
        assert spec.step_flops(site, 8) == spec.step_flops(site, 2**20)
        assert spec.flops(site, 2048) == 2048 * spec.flops(site, 1)


def test_groups_of_mamba2_share_b_and_c() -> None:
    one, four = (mixer("mamba2", head_dim=16, d_state=32, n_groups=n) for n in (1, 4))
    more = 3 * 2 * 32  # further channels of B and C
    assert four.num_params(Site(64)) - one.num_params(Site(64)) == more * (64 + 5)
    assert four.flops(Site(64), 1) - one.flops(Site(64), 1) == 2 * more * 64 + 3 * 2 * 64 * 32


@torch.no_grad()
def test_recurrent_states_are_float32_and_nothing_of_a_prefill_is_kept() -> None:
    for spec in (
        mixer("scalar_decay", **SMALL, conv=4),
        mixer("gla", **SMALL),
        mixer("mamba"),
        mixer("mamba2", **SMALL),
        mixer("short_conv"),
    ):
        module = built(spec).bfloat16()
        state = module.init_state(2, 300, torch.device("cpu"), torch.bfloat16)
        shapes = {name: value.shape for name, value in state.items()}
        for position, n in ((0, 256), (256, 1), (257, 7)):
            (module.step if n == 1 else module.extend)(torch.randn(2, n, 64).bfloat16(), state, position)
            assert {name: value.shape for name, value in state.items()} == shapes
            for name, value in state.items():
                assert value.dtype == (torch.float32 if name == "s" else torch.bfloat16)
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


# --- what is refused ---


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            mixer("scalar_decay"),
            "head_dim 64 does not divide the key width 96 (expand 1 x d_model 96); write a divisor of 96",
        ),
        (
            mixer("scalar_decay", head_dim=32, expand_v="1/3"),
            "the 3 heads do not divide the value width 32 of d_model 96; write an expand_v that is a multiple of 3/96",
        ),
        (mixer("scalar_decay", head_dim=32, expand_v="3/96"), None),
        (
            mixer("scalar_decay", head_dim=32, expand_v=1e-3),
            "the 3 heads do not divide the value width 0 of d_model 96",
        ),
        (
            mixer("gla"),
            "head_dim 64 does not divide the key width 48 (expand_k 0.5 x d_model 96); write a divisor of 48",
        ),
        (mixer("gla", head_dim=16, expand_v="1/4"), None),
        (mixer("gla", head_dim=6, expand_v="1/4"), None),
        (mixer("gla", head_dim=6, expand_v=1.01), "the 8 heads do not divide the value width 97"),
        (
            mixer("mamba2", expand=1),
            "head_dim 64 does not divide the width 96 (expand 1 x d_model 96); write a divisor of 96",
        ),
        (mixer("mamba2", n_groups=2), "n_groups 2 does not divide the 3 heads of d_model 96; write a divisor of 3"),
        (mixer("mamba", expand=1e-3), "expand 0.001 leaves no channel of d_model 96"),
        (mixer("mamba"), None),
        (mixer("short_conv"), None),
    ],
    ids=str,
)
def test_widths_must_divide(spec: Any, message: str | None) -> None:
    if message is None:
        spec.check(Site(96))
        spec.call(Site(96)).build()
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            spec.check(Site(96))
