"""Gemma 3 (2503.19786) as transformers has it: `Gemma3ForCausalLM`, sliding windows between full attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.attention import ROTATED, heads, renamed, softmax_attention
from archsearch.export.dialects.base import EPS, Dialect, Layer, Names, Part, need, only, refuse
from archsearch.export.dialects.feedforward import swiglu


class Gemma3(Dialect):
    """Norms before and after every branch, multiplied by 1 + w; unit queries and keys; embedding times sqrt(d_model).

    Its FFN is GELU-gated as published; the class takes any activation, so ours is SiLU. All windows are equal, and so
    are all heads; each of the two kinds of layer has its own rope_theta.
    """

    name = "gemma3"
    title = "Gemma-3"
    norm_offset = 1.0
    names: ClassVar[Names] = Names(
        {
            "mixer_norm": "input_layernorm.weight",
            "mixer_post_norm": "post_attention_layernorm.weight",
            "ffn_norm": "pre_feedforward_layernorm.weight",
            "ffn_post_norm": "post_feedforward_layernorm.weight",
        }
    )

    def check_trunk(self, spec: ModelSpec) -> None:
        trunk = spec.trunk
        need(trunk.norm == "rmsnorm", f"{self.title} has RMSNorm, not {trunk.norm}", "trunk.norm: rmsnorm")
        why = f"{self.title} norms what goes into a branch and what comes out"
        need(trunk.norm_place == "sandwich", f"{why}, not {trunk.norm_place} alone", "trunk.norm_place: sandwich")

    def embed_scale(self, spec: ModelSpec) -> float:
        return float(spec.d_model**0.5)

    def mixer(self, spec: ModelSpec, i: int) -> Part:
        attention = softmax_attention(spec, i, self.title, "attention and sliding-window attention")
        only(spec, i, "mixer", self.title, *ROTATED, "window")
        if not attention.qk_norm:
            refuse(spec, i, "mixer", f"{self.title} norms queries and keys", "qk_norm: true")
        if attention.rope_dims() != attention.head_dim:
            why = f"{self.title} rotates all features of a head, this block {attention.rope_dims()}"
            refuse(spec, i, "mixer", why, "position: rope with rope_fraction: 1")
        sizes = heads(spec, i, attention)
        if spec.d_model % sizes["num_attention_heads"]:
            why = f"{self.title} wants a number of heads that divides d_model {spec.d_model}, this block has "
            refuse(spec, i, "mixer", f"{why}{sizes['num_attention_heads']}", f"a divisor of {spec.d_model}")
        kind = "full_attention" if attention.window is None else "sliding_attention"
        settings: dict[str, Any] = {**sizes, f"theta of {kind}": attention.rope_theta}
        if attention.window is not None:
            settings["sliding_window"] = attention.window
        return Part(kind, settings, renamed("self_attn.", self.norm_offset), ("self_attn.o_proj.weight",))

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        return swiglu(spec, i, self.title)

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        kinds = ("full_attention", "sliding_attention")
        thetas = {kind: settings.get(f"theta of {kind}", 10000.0) for kind in kinds}
        return {
            **{key: value for key, value in settings.items() if not key.startswith("theta of")},
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "layer_types": [layer.mixer.kind for layer in layers],
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": thetas[kind]} for kind in kinds},
            "query_pre_attn_scalar": settings["head_dim"],
            "hidden_activation": "silu",
            "rms_norm_eps": EPS,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        }

    def stock_class(self, config: Mapping[str, Any]) -> Any:
        from transformers import Gemma3ForCausalLM

        return Gemma3ForCausalLM
