"""Jamba (2403.19887) as transformers has it: Mamba with inner norms and attention without positions, dense or MoE.

Where attention and experts stand is written as a period and an offset each, so nothing else can be said of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.attention import heads
from archsearch.export.dialects.base import EPS, Dialect, Layer, Names, Part, Role, Tensors, only, refuse
from archsearch.export.dialects.feedforward import swiglu
from archsearch.export.dialects.parts import ONLY_THE_LOSS, QKVO, has_attention, mapped, stacked
from archsearch.ffns.moe import MoE
from archsearch.mixers.attention import Attention
from archsearch.mixers.mamba import Mamba

if TYPE_CHECKING:
    from torch import Tensor

MAMBA = {
    "in_proj.weight": "mamba.in_proj.weight",
    "conv_weight": "mamba.conv1d.weight",
    "conv_bias": "mamba.conv1d.bias",
    "x_proj.weight": "mamba.x_proj.weight",
    "dt_proj.weight": "mamba.dt_proj.weight",
    "dt_bias": "mamba.dt_proj.bias",
    "A_log": "mamba.A_log",
    "D": "mamba.D",
    "dt_norm.weight": "mamba.dt_layernorm.weight",
    "B_norm.weight": "mamba.b_layernorm.weight",
    "C_norm.weight": "mamba.c_layernorm.weight",
    "o_proj.weight": "mamba.out_proj.weight",
}


class Jamba(Dialect):
    """JambaForCausalLM. Its router leaves the chosen probabilities as they are: `normalize: false` or `top_k: 1`."""

    name = "jamba"
    title = "Jamba"
    names: ClassVar[Names] = Names(
        norms={"mixer_norm": "input_layernorm.weight", "ffn_norm": "pre_ff_layernorm.weight"},
        final_norm="model.final_layernorm.weight",
    )

    def mixer(self, spec: ModelSpec, i: int) -> Part:
        mixer = spec.blocks[i].mixer
        if isinstance(mixer, Mamba):
            return self._mamba(spec, i, mixer)
        if not isinstance(mixer, Attention):
            refuse(
                spec,
                i,
                "mixer",
                f"the mixers of Jamba are mamba and attention, not {mixer.kind}",
                "kind: mamba or attention",
            )
        if mixer.position != "none":
            refuse(spec, i, "mixer", "attention of Jamba has no positions", "position: none")
        ignored = ("rope_theta", "rope_fraction")  # nothing is rotated
        only(spec, i, "mixer", self.title, "head_dim", "expand", "kv_groups", "position", *ignored)
        return Part("attention", heads(spec, i, mixer), mapped(QKVO), ("self_attn.o_proj.weight",))

    def _mamba(self, spec: ModelSpec, i: int, mixer: Mamba) -> Part:
        only(spec, i, "mixer", self.title, "expand", "d_state", "conv", "dt_rank", "inner_norm")
        if not mixer.inner_norm:
            refuse(spec, i, "mixer", "Jamba norms dt, B and C", "inner_norm: true")
        site = spec.site(i)
        expand, rest = divmod(mixer.d_inner(site), site.d_model)
        if rest:
            refuse(spec, i, "mixer", f"Jamba's mamba_expand is an integer, not {mixer.expand:g}", "expand: 1 or 2, say")
        settings = {
            "mamba_expand": expand,
            "mamba_d_state": mixer.d_state,
            "mamba_d_conv": mixer.conv,
            "mamba_dt_rank": mixer.rank(site),
        }
        return Part("mamba", settings, mapped(MAMBA, "conv_weight"), ("mamba.out_proj.weight",))

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        ffn = spec.blocks[i].ffn
        if not isinstance(ffn, MoE):
            return swiglu(spec, i, self.title, prefix="feed_forward.", expected="swiglu or moe")
        if ffn.routing != "softmax":
            refuse(spec, i, "ffn", f"Jamba's router is a softmax, not a {ffn.routing}", "routing: softmax")
        if ffn.normalize and ffn.top_k > 1:
            why = f"Jamba weighs each expert with its own probability; here the {ffn.top_k} weights sum to one"
            refuse(spec, i, "ffn", why, "normalize: false, or top_k: 1")
        if ffn.n_experts == 1:
            refuse(spec, i, "ffn", "Jamba has no router for a single expert", "n_experts: 2 or more, or kind: swiglu")
        only(spec, i, "ffn", self.title, "n_experts", "top_k", "expand", "normalize", "route_scale", *ONLY_THE_LOSS)
        settings = {
            "intermediate_size": ffn.d_hidden(spec.site(i)),
            "num_experts": ffn.n_experts,
            "num_experts_per_tok": ffn.top_k,
        }

        def tensors(own: Tensors) -> dict[str, Tensor]:
            made = stacked(own, "feed_forward.experts.", ffn.route_scale)
            return {"feed_forward.router.weight": own["router.weight"], **made}

        return Part("moe", settings, tensors, ("feed_forward.experts.down_proj",))

    def check_layout(self, spec: ModelSpec, layers: Sequence[Layer]) -> None:
        has_attention(layers, "attention", self.title)

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        attention = _period(spec, [layer.mixer.kind == "attention" for layer in layers], "mixer")
        experts = _period(spec, [layer.ffn.kind == "moe" for layer in layers], "ffn")
        unused = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 1, "num_experts_per_tok": 1}
        return {
            "model_type": self.name,
            "architectures": ["JambaForCausalLM"],
            "hidden_act": "silu",
            "rms_norm_eps": EPS,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "attn_layer_period": attention[0],
            "attn_layer_offset": attention[1],
            "expert_layer_period": experts[0],
            "expert_layer_offset": experts[1],
            **unused,
            **settings,
        }

    def stock_class(self, config: Mapping[str, Any]) -> Any:
        from transformers import JambaForCausalLM

        return JambaForCausalLM


def _period(spec: ModelSpec, there: Sequence[bool], role: Role) -> tuple[int, int]:
    """The smallest period and the offset that say where something stands; refuses the first block that breaks them."""
    n = len(there)
    fitting = [(p, o) for p in range(1, n + 2) for o in range(p) if all((i % p == o) == there[i] for i in range(n))]
    if not fitting:
        _refuse_places(spec, [i for i in range(n) if there[i]], role)
    return fitting[0]


def _refuse_places(spec: ModelSpec, places: Sequence[int], role: Role) -> NoReturn:
    what, other, key = ("attention", "mamba", "attn_layer") if role == "mixer" else ("moe", "swiglu", "expert_layer")
    period = places[1] - places[0]  # one place alone always fits
    offset = places[0] % period
    wrong = next(i for i in range(spec.n_blocks) if (i % period == offset) != (i in places))
    listed = ", ".join(map(str, places))
    why = f"Jamba says by one period and one offset where {what} stands, and blocks {listed} follow none"
    rule = f"{key}_period {period} and {key}_offset {offset}, as blocks {places[0]} and {places[1]} have it"
    refuse(spec, wrong, role, why, f"{other if wrong in places else what} here ({rule})")
