"""Attention and mixture-of-experts layers against transformers' own, with the weights copied across."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from archsearch.architecture import parse_ffn, parse_mixer
from archsearch.contract import Site

T, D = 50, 64


def ours(kind: str, **options: Any) -> Any:
    parse = parse_ffn if kind == "moe" else parse_mixer
    return parse({"kind": kind, **options}).call(Site(D)).build().eval()


def theirs(module: nn.Module, seed: int = 0) -> Any:
    """Normal weights, norms and buffers included, so that none of them can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data.copy_(noise * (tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.3))
    return module.eval()


def copy(weights: dict[str, Tensor], module: nn.Module) -> None:
    """Every parameter and buffer of ours gets a value."""
    module.load_state_dict({name: weight.detach() for name, weight in weights.items()}, strict=True)


def mask(window: int | None = None) -> Tensor:
    """[1, 1, T, T]: 0 where a query may look."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance < (window or T))
    return torch.zeros(1, 1, T, T).masked_fill(~seen, float("-inf"))


def rotary(embedding: Any, x: Tensor, *layer_type: str) -> Any:
    return embedding(x, torch.arange(T)[None], *layer_type)


def assert_same(module: Any, x: Tensor, expected: Tensor) -> None:
    """The training form, and a decode of one prefill and single tokens."""
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        state = module.init_state(x.shape[0], T, x.device, x.dtype)
        pieces = [module.extend(x[:, :30], state, 0)]
        pieces += [module.step(x[:, t : t + 1], state, t) for t in range(30, T)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q_latent", [None, 24])
def test_mla_is_deepseek_v3(q_latent: int | None) -> None:
    config = deepseek.DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        kv_lora_rank=32,
        q_lora_rank=q_latent,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        attn_implementation="eager",
    )
    other = theirs(deepseek.DeepseekV3Attention(config, 0))
    module = ours(
        "mla",
        head_dim=16,
        v_head_dim=12,
        rope_dim=8,
        rope_theta=5000,
        latent=1 / 2,
        q_latent=q_latent and q_latent / D,
    )
    # interleaved pairs of rotated features there, halves here: the dot product does not mind the order
    halves = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    q = (other.q_proj if q_latent is None else other.q_b_proj).weight.view(4, 24, -1)
    q = torch.cat([q[:, :16], q[:, 16:][:, halves]], dim=1).flatten(0, 1)
    down = other.kv_a_proj_with_mqa.weight
    k_up, v_up = other.kv_b_proj.weight.view(4, 28, 32).split([16, 12], dim=1)
    weights = {
        "q_proj.weight": q,
        "kv_compress.weight": torch.cat([down[:32], down[32:][halves]]),
        "latent_norm.weight": other.kv_a_layernorm.weight,
        "k_up.weight": k_up.flatten(0, 1),
        "v_up.weight": v_up.flatten(0, 1),
        "o_proj.weight": other.o_proj.weight,
    }
    if q_latent is not None:
        weights["q_compress.weight"] = other.q_a_proj.weight
        weights["q_latent_norm.weight"] = other.q_a_layernorm.weight
    copy(weights, module)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        expected = other(x, rotary(deepseek.DeepseekV3RotaryEmbedding(config), x), mask())[0]
    assert_same(module, x, expected)


def test_gated_attention_is_qwen3_next() -> None:
    """Output gate per element, QK-norm, a quarter of each head rotated."""
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
        attn_implementation="eager",
    )
    other = theirs(qwen3_next.Qwen3NextAttention(config, 0))
    module = ours(
        "attention",
        head_dim=32,
        expand=2,
        kv_groups=2,
        rope_theta=5000,
        rope_fraction=0.25,
        qk_norm=True,
        gate="element",
    )
    q, gate = other.q_proj.weight.view(4, 2, 32, D).unbind(1)
    weights = {
        "q_proj.weight": q.flatten(0, 1),
        "gate_proj.weight": gate.flatten(0, 1),
        "k_proj.weight": other.k_proj.weight,
        "v_proj.weight": other.v_proj.weight,
        "o_proj.weight": other.o_proj.weight,
        "q_norm.weight": 1 + other.q_norm.weight,
        "k_norm.weight": 1 + other.k_norm.weight,
    }
    copy(weights, module)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        expected = other(x, rotary(qwen3_next.Qwen3NextRotaryEmbedding(config), x), mask())[0]
    assert_same(module, x, expected)


@pytest.mark.parametrize("window", [None, 7])
def test_sinks_and_windows_are_gpt_oss(window: int | None) -> None:
    config = gpt_oss.GptOssConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=False,
        sliding_window=window,
        layer_types=["sliding_attention" if window else "full_attention"],
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        attn_implementation="eager",
    )
    other = theirs(gpt_oss.GptOssAttention(config, 0))
    module = ours("attention", head_dim=16, kv_groups=2, rope_theta=5000, sink=True, window=window)
    weights = {f"{name}.weight": getattr(other, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    copy({**weights, "sink": other.sinks}, module)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        expected = other(x, rotary(gpt_oss.GptOssRotaryEmbedding(config), x), mask(window))[0]
    assert_same(module, x, expected)


def test_sliding_window_is_gemma3() -> None:
    config = gemma3.Gemma3TextConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=9,
        layer_types=["sliding_attention"],
        num_hidden_layers=1,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}},
        attn_implementation="eager",
    )
    other = theirs(gemma3.Gemma3Attention(config, 0))
    module = ours("attention", head_dim=16, kv_groups="all", rope_theta=5000, qk_norm=True, window=9)
    weights = {f"{name}.weight": getattr(other, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    weights |= {f"{name}.weight": 1 + getattr(other, name).weight for name in ("q_norm", "k_norm")}
    copy(weights, module)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        embedding = rotary(gemma3.Gemma3RotaryEmbedding(config), x, "sliding_attention")
        expected = other(x, embedding, mask(9))[0]
    assert_same(module, x, expected)


def experts(other: Any) -> dict[str, Tensor]:
    gate, up = other.gate_up_proj.chunk(2, dim=1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": other.down_proj}


def test_softmax_routing_is_mixtral() -> None:
    config = mixtral.MixtralConfig(
        hidden_size=D, intermediate_size=32, num_local_experts=6, num_experts_per_tok=2, attn_implementation="eager"
    )
    other = theirs(mixtral.MixtralSparseMoeBlock(config))
    module = ours("moe", n_experts=6, top_k=2, expand=1 / 2, z_loss=0, aux_loss=1)
    copy({"router.weight": other.gate.weight, **experts(other.experts)}, module)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        torch.testing.assert_close(module(x), other(x), rtol=1e-4, atol=1e-5)
        module.train()(x)
        logits, _, _ = other.gate(x.flatten(0, 1))
        pooled = mixtral.load_balancing_loss_func((logits,), 6, 2)  # its shares of choices sum to top_k, ours to 1
        torch.testing.assert_close(module.router_loss, pooled / 2)


def test_sigmoid_routing_is_deepseek_v3() -> None:
    config = deepseek.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
    )
    other = theirs(deepseek.DeepseekV3MoE(config))
    module = ours("moe", n_experts=8, top_k=3, n_shared=2, expand=1 / 2, routing="sigmoid", route_scale=2.5)
    shared = {f"shared.{name}": weight for name, weight in other.shared_experts.state_dict().items()}
    bias = other.gate.e_score_correction_bias
    assert bias.abs().max() > 0.1
    copy({"router.weight": other.gate.weight, "bias": bias, **experts(other.experts), **shared}, module)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        torch.testing.assert_close(module(x), other(x), rtol=1e-4, atol=1e-5)
