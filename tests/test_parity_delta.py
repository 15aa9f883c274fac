"""Delta-rule mixers and the independent ones in transformers compute the same from the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import KimiLinearConfig, OlmoHybridConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention, chunk_kimi_delta_attention
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet, torch_chunk_gated_delta_rule

from archsearch.architecture import parse_mixer
from archsearch.contract import Site
from archsearch_kernels.delta_rule import delta_rule
from archsearch_kernels.kda import kda

D_MODEL = 64
LENGTHS = [1, 63, 100, 257]


def ours(**spec: Any) -> Any:
    return parse_mixer(spec).call(Site(D_MODEL)).build()


def randomise(module: nn.Module) -> None:
    """Trained-looking numbers, so that no weight is at a value that hides it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or name.endswith("A_log"):
                parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def copy(weights: dict[str, Tensor], module: nn.Module) -> None:
    """All of the module's parameters, none twice."""
    module.load_state_dict({name: value.detach().clone() for name, value in weights.items()}, strict=True)


def assert_same(module: Any, theirs: Any, length: int) -> None:
    """Outputs, input gradients and token-by-token outputs.

    With steps up to 2 the gradient of a float32 loop over tokens is already 3e-5 away from float64.
    """
    x = torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(length))
    results = []
    for run in (module, theirs):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        results.append((y.detach(), gradient))
    for mine, expected, error in zip(*results, (1e-5, 1e-4), strict=True):
        assert (mine - expected).abs().max() <= error * expected.abs().max()
    state = module.init_state(2, length, x.device, x.dtype)
    with torch.no_grad():
        steps = [module.step(x[:, t : t + 1], state, t) for t in range(length)]
    assert (torch.cat(steps, 1) - results[1][0]).abs().max() <= 1e-5 * results[1][0].abs().max()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2])
def test_gated_deltanet_of_qwen3_next(groups: int, length: int) -> None:
    heads, K, V = 4, 16, 24
    config = Qwen3NextConfig(
        hidden_size=D_MODEL,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads * groups,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        layer_types=["linear_attention"],
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    randomise(theirs)
    module = ours(kind="gated_deltanet", head_dim=K, expand_v=V / K, value_groups=groups)
    qkvz = theirs.in_proj_qkvz.weight.view(heads, -1, D_MODEL)  # key head by key head
    q, k, v, z = (w.flatten(0, 1) for w in qkvz.split([K, K, groups * V, groups * V], dim=1))
    ba = theirs.in_proj_ba.weight.view(heads, 2, groups, D_MODEL)
    copy(
        {
            "qkv_proj.weight": torch.cat([q, k, v]),
            "conv_weight": theirs.conv1d.weight[:, 0],
            "beta_proj.weight": ba[:, 0].flatten(0, 1),
            "decay_proj.weight": ba[:, 1].flatten(0, 1),
            "A_log": theirs.A_log,
            "dt_bias": theirs.dt_bias,
            "gate_proj.weight": z,
            "norm.weight": theirs.norm.weight,
            "o_proj.weight": theirs.out_proj.weight,
        },
        module,
    )
    assert_same(module, theirs, length)


def olmo_hybrid(neg_eigenvalues: bool) -> tuple[Any, dict[str, Tensor]]:
    """The paper's sizes (3/4 d_model keys, twice as many values), and its weights under our names."""
    config = OlmoHybridConfig(
        hidden_size=D_MODEL,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_hidden_layers=2,
        linear_allow_neg_eigval=neg_eigenvalues,
    )
    theirs = OlmoHybridGatedDeltaNet(config, 0)
    theirs.o_norm.variance_epsilon = 1e-6
    randomise(theirs)
    return theirs, {
        "qkv_proj.weight": torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]),
        "conv_weight": theirs.conv1d.weight[:, 0],
        "beta_proj.weight": theirs.b_proj.weight,
        "gate_proj.weight": theirs.g_proj.weight,
        "norm.weight": theirs.o_norm.weight,
        "o_proj.weight": theirs.o_proj.weight,
    }


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("neg_eigenvalues", [False, True])
def test_gated_deltanet_of_olmo_hybrid(neg_eigenvalues: bool, length: int) -> None:
    theirs, weights = olmo_hybrid(neg_eigenvalues)
    module = ours(kind="gated_deltanet", head_dim=16, expand="3/4", neg_eigenvalues=neg_eigenvalues)
    decay = {"decay_proj.weight": theirs.a_proj.weight, "A_log": theirs.A_log, "dt_bias": theirs.dt_bias}
    copy(weights | decay, module)
    assert_same(module, theirs, length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("neg_eigenvalues", [False, True])
def test_deltanet_is_olmo_hybrid_that_never_forgets(neg_eigenvalues: bool, length: int) -> None:
    theirs, weights = olmo_hybrid(neg_eigenvalues)
    nn.init.constant_(theirs.A_log, float("-inf"))
    options = {"head_dim": 16, "expand": "3/4", "expand_v": 2, "gate": True, "neg_eigenvalues": neg_eigenvalues}
    module = ours(kind="deltanet", **options)
    copy(weights, module)
    assert_same(module, theirs, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_kda_of_kimi_linear(length: int) -> None:
    config = KimiLinearConfig(
        hidden_size=D_MODEL,
        linear_head_dim=16,
        linear_num_heads=4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
        rms_norm_eps=1e-6,
    )
    theirs = KimiLinearDeltaAttention(config, 0)
    randomise(theirs)
    module = ours(kind="kda", head_dim=16)
    copy(
        {
            "qkv_proj.weight": torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]),
            "conv_weight": theirs.conv1d.weight[:, 0],
            "beta_proj.weight": theirs.b_proj.weight,
            "f_a_proj.weight": theirs.forget_gate.f_a_proj.weight,
            "f_b_proj.weight": theirs.forget_gate.f_b_proj.weight,
            "A_log": theirs.forget_gate.A_log.flatten(),
            "dt_bias": theirs.forget_gate.dt_bias,
            "g_a_proj.weight": theirs.g_a_proj.weight,
            "g_b_proj.weight": theirs.g_b_proj.weight,
            "norm.weight": theirs.o_norm.weight,
            "o_proj.weight": theirs.o_proj.weight,
        },
        module,
    )
    assert_same(module, theirs, length)


def op_inputs(length: int, gate_shape: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(length)
    q, k = (F.normalize(torch.randn(2, length, 2, 16), dim=-1) for _ in range(2))
    v, beta = torch.randn(2, length, gate_shape[2], 8), torch.rand(2, length, gate_shape[2])
    return [x.requires_grad_() for x in (q, k, v, beta, -torch.rand(gate_shape), torch.randn(2, gate_shape[2], 16, 8))]


def assert_same_results(tensors: list[Tensor], mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Outputs, final states and gradients."""
    pairs = []
    for o, state in (mine, theirs):
        loss = o.square().sum() + state.square().sum()
        pairs.append((o, state, *torch.autograd.grad(loss, tensors)))
    for got, expected in zip(*pairs, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2])
def test_delta_rule_is_qwen3_nexts(groups: int, length: int) -> None:
    tensors = op_inputs(length, (2, length, 2 * groups))
    q, k, v, beta, g, state = tensors
    theirs = torch_chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    assert_same_results(tensors, delta_rule(q, k, v, beta, g, initial_state=state), theirs)


@pytest.mark.parametrize("length", LENGTHS)
def test_kda_is_kimi_linears(length: int) -> None:
    tensors = op_inputs(length, (2, length, 2, 16))
    q, k, v, beta, g, state = tensors
    theirs = chunk_kimi_delta_attention(q, k, v, g, beta, initial_state=state, output_final_state=True)
    assert_same_results(tensors, kda(q, k, v, beta, g, initial_state=state), theirs)
