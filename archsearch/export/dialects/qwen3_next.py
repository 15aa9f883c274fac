"""Qwen3-Next as transformers has it: `Qwen3NextForCausalLM`, Gated DeltaNet and gated attention, dense or experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from archsearch.architecture import ModelSpec
from archsearch.contract import Site
from archsearch.export.dialects.attention import ROTATED, heads, softmax_attention
from archsearch.export.dialects.base import EPS, Dialect, Layer, Names, Part, Tensors, only, refuse, share
from archsearch.export.dialects.feedforward import swiglu
from archsearch.export.dialects.parts import ONLY_THE_LOSS, has_attention, stacked
from archsearch.ffns.moe import MoE
from archsearch.mixers.attention import Attention
from archsearch.mixers.gated_deltanet import GatedDeltaNet

if TYPE_CHECKING:
    from torch import Tensor

MIXERS = "gated_deltanet and attention with an elementwise gate"
NO_SHARED = "which gate a shared expert of width 0"
SHARED_GATE = "which gate the shared experts: zeros, which halve them, so the experts' own weights are doubled"


class Qwen3Next(Dialect):
    """Norms of blocks, queries and keys multiply by 1 + w; the norm inside Gated DeltaNet by w."""

    name = "qwen3_next"
    title = "Qwen3-Next"
    norm_offset = 1.0
    names: ClassVar[Names] = Names(
        {"mixer_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight"}
    )

    def mixer(self, spec: ModelSpec, i: int) -> Part:
        mixer = spec.blocks[i].mixer
        return self._delta(spec, i, mixer) if isinstance(mixer, GatedDeltaNet) else self._attention(spec, i)

    def _delta(self, spec: ModelSpec, i: int, mixer: GatedDeltaNet) -> Part:
        only(spec, i, "mixer", self.title, "head_dim", "expand", "expand_v", "value_groups", "conv")
        site = spec.site(i)
        settings = {
            "linear_num_key_heads": mixer.n_k_heads(site),
            "linear_num_value_heads": mixer.n_v_heads(site),
            "linear_key_head_dim": mixer.head_dim,
            "linear_value_head_dim": mixer.head_v_dim(),
            "linear_conv_kernel_dim": mixer.conv,
        }
        return Part("linear_attention", settings, delta_tensors(mixer, site), ("linear_attn.out_proj.weight",))

    def _attention(self, spec: ModelSpec, i: int) -> Part:
        mixer = softmax_attention(spec, i, self.title, MIXERS)
        only(spec, i, "mixer", self.title, *ROTATED, "gate")
        for name, expected in (("gate", "element"), ("qk_norm", True), ("position", "rope")):
            if (found := getattr(mixer, name)) != expected:
                why = f"the attention of {self.title} has {name} {expected}, not {found}"
                refuse(spec, i, "mixer", why, f"{name}: {str(expected).lower()}")
        fraction = share(mixer.rope_dims(), mixer.head_dim)
        settings = {**heads(spec, i, mixer), "rope_theta": mixer.rope_theta, "partial_rotary_factor": fraction}
        return Part(
            "full_attention", settings, attention_tensors(mixer, site=spec.site(i)), ("self_attn.o_proj.weight",)
        )

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        ffn = spec.blocks[i].ffn
        return (
            self._experts(spec, i, ffn)
            if isinstance(ffn, MoE)
            else swiglu(spec, i, self.title, expected="swiglu or moe")
        )

    def _experts(self, spec: ModelSpec, i: int, ffn: MoE) -> Part:
        options = ("n_experts", "top_k", "n_shared", "expand", "normalize", "route_scale")
        only(spec, i, "ffn", self.title, *options, *ONLY_THE_LOSS)
        hidden = ffn.d_hidden(spec.site(i))
        settings = {
            "num_experts": ffn.n_experts,
            "num_experts_per_tok": ffn.top_k,
            "moe_intermediate_size": hidden,
            "shared_expert_intermediate_size": ffn.n_shared * hidden,
            "norm_topk_prob": ffn.normalize and ffn.top_k > 1,  # a single one keeps its own score
            "router_aux_loss_coef": ffn.aux_loss,
        }
        outputs = ("mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight")
        added = {"mlp.shared_expert_gate.weight": SHARED_GATE if ffn.n_shared else NO_SHARED}
        return Part("moe", settings, expert_tensors(ffn), outputs, added)

    def check_layout(self, spec: ModelSpec, layers: Sequence[Layer]) -> None:
        has_attention(layers, "full_attention", self.title)

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        sizes = dict(settings)
        rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta", 10000.0)}
        rope["partial_rotary_factor"] = sizes.pop("partial_rotary_factor", 1.0)
        return {
            **sizes,
            "model_type": "qwen3_next",
            "architectures": ["Qwen3NextForCausalLM"],
            "layer_types": [layer.mixer.kind for layer in layers],
            "mlp_only_layers": [i for i, layer in enumerate(layers) if layer.ffn.kind == "dense"],
            "decoder_sparse_step": 1,
            "num_experts": sizes.get("num_experts", 0),
            "rope_parameters": rope,
            "hidden_act": "silu",
            "rms_norm_eps": EPS,
            "attention_bias": False,
            "attention_dropout": 0.0,
        }

    def stock_class(self, config: Mapping[str, Any]) -> Any:
        from transformers import Qwen3NextForCausalLM

        return Qwen3NextForCausalLM


def delta_tensors(mixer: GatedDeltaNet, site: Site) -> Callable[[Tensors], dict[str, Tensor]]:
    """Projections of one key head and its value heads lie together: q, k, v, gate; and step, decay."""
    n_k_heads, group = mixer.n_k_heads(site), mixer.value_groups

    def tensors(own: Tensors) -> dict[str, Tensor]:
        import torch

        def by_head(*parts: Tensor) -> Tensor:
            return torch.cat([p.reshape(n_k_heads, -1, p.shape[-1]) for p in parts], dim=1).flatten(0, 1)

        d_key, d_value = n_k_heads * mixer.head_dim, n_k_heads * group * mixer.head_v_dim()
        q, k, v = torch.split(own["qkv_proj.weight"], [d_key, d_key, d_value])
        at = "linear_attn."
        return {
            f"{at}in_proj_qkvz.weight": by_head(q, k, v, own["gate_proj.weight"]),
            f"{at}in_proj_ba.weight": by_head(own["beta_proj.weight"], own["decay_proj.weight"]),
            f"{at}conv1d.weight": own["conv_weight"][:, None],
            f"{at}A_log": own["A_log"],
            f"{at}dt_bias": own["dt_bias"],
            f"{at}norm.weight": own["norm.weight"],
            f"{at}out_proj.weight": own["o_proj.weight"],
        }

    return tensors


def attention_tensors(mixer: Attention, site: Site) -> Callable[[Tensors], dict[str, Tensor]]:
    """A head's queries and its gate lie together."""
    n_heads = mixer.n_heads(site)

    def tensors(own: Tensors) -> dict[str, Tensor]:
        import torch

        both = [own[f"{name}_proj.weight"].reshape(n_heads, -1, site.d_model) for name in ("q", "gate")]
        made = {f"self_attn.{name}_proj.weight": own[f"{name}_proj.weight"] for name in ("k", "v", "o")}
        made |= {f"self_attn.{name}_norm.weight": own[f"{name}_norm.weight"] - 1.0 for name in ("q", "k")}
        return made | {"self_attn.q_proj.weight": torch.cat(both, dim=1).flatten(0, 1)}

    return tensors


def expert_tensors(ffn: MoE) -> Callable[[Tensors], dict[str, Tensor]]:
    """Stacked experts, and the shared one that the class always has: of width 0 if there is none."""

    def tensors(own: Tensors) -> dict[str, Tensor]:
        router = own["router.weight"]
        empty = router.new_zeros(0, router.shape[1])
        shared = {name: own.get(f"shared.{name}_proj.weight", empty) for name in ("gate", "up")}
        shared["down"] = own.get("shared.down_proj.weight", empty.T) * 2.0  # behind a gate of sigmoid(0)
        return {
            "mlp.gate.weight": router,
            **stacked(own, "mlp.experts.", ffn.route_scale),
            "mlp.shared_expert_gate.weight": router.new_zeros(1, router.shape[1]),
            **{f"mlp.shared_expert.{name}_proj.weight": tensor for name, tensor in shared.items()},
        }

    return tensors
