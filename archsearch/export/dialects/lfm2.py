"""LFM2 (Liquid AI, 2511.23404) as transformers has it: gated short convolutions and attention with normed q and k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.attention import heads
from archsearch.export.dialects.base import EPS, Dialect, Layer, Names, Part, only, refuse
from archsearch.export.dialects.parts import QKVO, has_attention, mapped, rotates_all
from archsearch.ffns.swiglu import SwiGLU
from archsearch.mixers.attention import Attention
from archsearch.mixers.short_conv import ShortConv

CONV = {
    "in_proj.weight": "conv.in_proj.weight",
    "conv_weight": "conv.conv.weight",
    "o_proj.weight": "conv.out_proj.weight",
}
ATTENTION = QKVO | {
    "o_proj.weight": "self_attn.out_proj.weight",
    "q_norm.weight": "self_attn.q_layernorm.weight",
    "k_norm.weight": "self_attn.k_layernorm.weight",
}
SWIGLU = {
    "gate_proj.weight": "feed_forward.w1.weight",
    "up_proj.weight": "feed_forward.w3.weight",
    "down_proj.weight": "feed_forward.w2.weight",
}


class Lfm2(Dialect):
    """Lfm2ForCausalLM; any order of its two mixers."""

    name = "lfm2"
    title = "LFM2"
    names: ClassVar[Names] = Names(
        norms={"mixer_norm": "operator_norm.weight", "ffn_norm": "ffn_norm.weight"},
        final_norm="model.embedding_norm.weight",
    )

    def mixer(self, spec: ModelSpec, i: int) -> Part:
        mixer = spec.blocks[i].mixer
        if isinstance(mixer, ShortConv):
            only(spec, i, "mixer", self.title, "kernel")
            taps = {"conv_L_cache": mixer.kernel}
            return Part("conv", taps, mapped(CONV, "conv_weight"), ("conv.out_proj.weight",))
        if not isinstance(mixer, Attention):
            why = f"the mixers of {self.title} are short_conv and attention, not {mixer.kind}"
            refuse(spec, i, "mixer", why, "kind: short_conv or attention")
        if not mixer.qk_norm:
            refuse(spec, i, "mixer", f"{self.title} norms queries and keys", "qk_norm: true")
        rotates_all(spec, i, self.title, mixer)
        only(spec, i, "mixer", self.title, "head_dim", "expand", "kv_groups", "qk_norm", "rope_theta", "rope_fraction")
        settings = {**heads(spec, i, mixer), "rope_theta": mixer.rope_theta}
        return Part("full_attention", settings, mapped(ATTENTION), ("self_attn.out_proj.weight",))

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        ffn = spec.blocks[i].ffn
        if not isinstance(ffn, SwiGLU):
            refuse(spec, i, "ffn", f"the FFN of {self.title} is a SwiGLU, not {ffn.kind}", "kind: swiglu")
        only(spec, i, "ffn", self.title, "expand")
        width = {"intermediate_size": ffn.d_hidden(spec.site(i))}
        return Part("dense", width, mapped(SWIGLU), ("feed_forward.w2.weight",))

    def check_layout(self, spec: ModelSpec, layers: Sequence[Layer]) -> None:
        has_attention(layers, "full_attention", self.title)

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The width of the FFN is written as it is; LFM2's own rule would take 2/3 of it and round up."""
        given = {"num_attention_heads": 1, "num_key_value_heads": 1, "rope_theta": 1e6} | dict(settings)
        rope = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
        return {
            "model_type": self.name,
            "architectures": ["Lfm2ForCausalLM"],
            "norm_eps": EPS,
            "conv_bias": False,
            "block_auto_adjust_ff_dim": False,
            "layer_types": [layer.mixer.kind for layer in layers],
            "rope_parameters": rope,
            **given,
        }

    def stock_class(self, config: Mapping[str, Any]) -> Any:
        from transformers import Lfm2ForCausalLM

        return Lfm2ForCausalLM
