"""Our mixers and the independent ones in transformers compute the same from the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import JambaConfig, Lfm2Config, Mamba2Config, MambaConfig, MiniMaxConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from archsearch.architecture import parse_mixer
from archsearch.contract import Site

D_MODEL = 64
LENGTHS = [1, 63, 100, 257]


def ours(layer_idx: int = 0, n_layers: int = 1, **spec: Any) -> Any:
    return parse_mixer(spec).call(Site(D_MODEL, layer_idx, n_layers)).build()


def randomise(module: nn.Module) -> None:
    """Trained-looking numbers, so that no weight is at a value that hides it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
            noise *= 0.3
        else:
            nn.init.zeros_(parameter)
            noise *= parameter.shape[-1] ** -0.5
        with torch.no_grad():
            parameter += noise


def copy(pairs: dict[str, Tensor], module: nn.Module) -> None:
    """All of the module's parameters, none twice."""
    module.load_state_dict({name: value.detach().clone() for name, value in pairs.items()}, strict=True)


def assert_same(module: Any, theirs: Any, length: int) -> None:
    """Outputs, input gradients and token-by-token outputs."""
    x = torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(length))
    results = []
    for run in (module, theirs):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        results.append((y.detach(), gradient))
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
    state = module.init_state(2, length, x.device, x.dtype)
    with torch.no_grad():
        steps = [module.step(x[:, t : t + 1], state, t) for t in range(length)]
    assert (torch.cat(steps, 1) - results[1][0]).abs().max() <= 1e-5 * results[1][0].abs().max()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("layer_idx", [0, 2, 3])
def test_lightning_of_minimax(layer_idx: int, length: int) -> None:
    config = MiniMaxConfig(
        hidden_size=D_MODEL,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
        block_size=32,
        hidden_act="silu",
    )
    theirs = MiniMaxLightningAttention(config, layer_idx)
    randomise(theirs)
    module = ours(layer_idx, 4, kind="scalar_decay", variant="lightning", head_dim=16)
    qkv = theirs.qkv_proj.weight.view(4, 3, 16, D_MODEL).transpose(0, 1)  # theirs is split head by head
    copy(
        {
            "qkv_proj.weight": qkv.reshape(3 * 64, D_MODEL),
            "gate_proj.weight": theirs.output_gate.weight,
            "norm.weight": theirs.norm.weight,
            "o_proj.weight": theirs.out_proj.weight,
        },
        module,
    )
    assert_same(module, lambda x: theirs(x, None, None)[0], length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("n_groups", [1, 2])
def test_mamba2(n_groups: int, length: int) -> None:
    config = Mamba2Config(
        hidden_size=D_MODEL,
        num_heads=8,
        head_dim=16,
        expand=2,
        state_size=24,
        n_groups=n_groups,
        conv_kernel=4,
        chunk_size=32,
        layer_norm_epsilon=1e-6,
        num_hidden_layers=1,
    )
    theirs = Mamba2Mixer(config, 0)
    randomise(theirs)
    module = ours(kind="mamba2", head_dim=16, d_state=24, n_groups=n_groups)
    copy(
        {
            "in_proj.weight": theirs.in_proj.weight,
            "conv_weight": theirs.conv1d.weight[:, 0],
            "conv_bias": theirs.conv1d.bias,
            "dt_bias": theirs.dt_bias,
            "A_log": theirs.A_log,
            "D": theirs.D,
            "norm_weight": theirs.norm.weight,
            "o_proj.weight": theirs.out_proj.weight,
        },
        module,
    )
    assert_same(module, theirs, length)


def mamba_weights(theirs: Any) -> dict[str, Tensor]:
    return {
        "in_proj.weight": theirs.in_proj.weight,
        "conv_weight": theirs.conv1d.weight[:, 0],
        "conv_bias": theirs.conv1d.bias,
        "x_proj.weight": theirs.x_proj.weight,
        "dt_proj.weight": theirs.dt_proj.weight,
        "dt_bias": theirs.dt_proj.bias,
        "A_log": theirs.A_log,
        "D": theirs.D,
        "o_proj.weight": theirs.out_proj.weight,
    }


@pytest.mark.parametrize("length", LENGTHS)
def test_mamba(length: int) -> None:
    config = MambaConfig(hidden_size=D_MODEL, state_size=8, conv_kernel=4, expand=2, num_hidden_layers=1)
    theirs = MambaMixer(config, 0)
    randomise(theirs)
    module = ours(kind="mamba", d_state=8)
    copy(mamba_weights(theirs), module)
    assert_same(module, theirs, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_mamba_of_jamba(length: int) -> None:
    config = JambaConfig(
        hidden_size=D_MODEL,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=6,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_mamba_kernels=False,
    )
    theirs = JambaMambaMixer(config, 0)
    randomise(theirs)
    module = ours(kind="mamba", d_state=8, dt_rank=6, inner_norm=True)
    norms = {
        "dt_norm.weight": theirs.dt_layernorm.weight,
        "B_norm.weight": theirs.b_layernorm.weight,
        "C_norm.weight": theirs.c_layernorm.weight,
    }
    copy(mamba_weights(theirs) | norms, module)
    assert_same(module, theirs, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_short_conv_of_lfm2(length: int) -> None:
    config = Lfm2Config(hidden_size=D_MODEL, conv_L_cache=3, conv_bias=False, num_hidden_layers=1, layer_types=["conv"])
    theirs = Lfm2ShortConv(config, 0)
    randomise(theirs)
    module = ours(kind="short_conv", kernel=3)
    copy(
        {
            "in_proj.weight": theirs.in_proj.weight,
            "conv_weight": theirs.conv.weight[:, 0],
            "o_proj.weight": theirs.out_proj.weight,
        },
        module,
    )
    assert_same(module, theirs, length)
