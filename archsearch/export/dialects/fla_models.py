"""fla's models by the kind of their linear mixer, and what its tensors are called there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.base import EPS, Layer, Names, Part, Tensors, only, refuse, share
from archsearch.export.dialects.fla import FLA_EPS, Fla
from archsearch.mixers.attention import Attention
from archsearch.mixers.deltanet import DeltaNet
from archsearch.mixers.gated_deltanet import GatedDeltaNet
from archsearch.mixers.gla import GLA
from archsearch.mixers.kda import KDA
from archsearch.mixers.mamba import Mamba
from archsearch.mixers.mamba2 import Mamba2
from archsearch.mixers.scalar_decay import ScalarDecay

if TYPE_CHECKING:
    from torch import Tensor

BACKBONE = "backbone.layers.{i}."
OUTPUT = "attn.o_proj.weight"


class FlaGLA(Fla):
    """`GLAForCausalLM` (2312.06635): decays from a projection of rank 16, to the power 1/16."""

    title, kind, model_type, architecture = "fla's GLA", "gla", "gla", "GLAForCausalLM"

    def linear(self, spec: ModelSpec, i: int) -> Part:
        mixer, site = spec.blocks[i].mixer, spec.site(i)
        assert isinstance(mixer, GLA)
        only(spec, i, "mixer", self.title, *(name for name in type(mixer).model_fields if not name.startswith("gate_")))
        heads = mixer.n_heads(site)
        call = mixer.call(site).arguments
        settings = {**expansions(spec, heads, call["head_k_dim"], call["head_v_dim"]), "num_heads": heads}
        renames = {
            "decay_in.weight": "gk_proj.0.weight",
            "decay_out.weight": "gk_proj.1.weight",
            "decay_out.bias": "gk_proj.1.bias",
            "gate_proj.weight": "g_proj.weight",
            "norm.weight": "g_norm_swish_gate.weight",
        }
        return Part(self.kind, settings, with_names(renames), (OUTPUT,))

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"use_output_gate": True, "use_short_conv": False, "feature_map": None, "clamp_min": None}
        return super().config(spec, layers, {**settings, **fixed, "elementwise_affine": True})


class FlaRetNet(Fla):
    """`RetNetForCausalLM` (2307.08621)."""

    title, kind, model_type, architecture = "fla's RetNet", "scalar_decay", "retnet", "RetNetForCausalLM"

    def linear(self, spec: ModelSpec, i: int) -> Part:
        mixer, site = spec.blocks[i].mixer, spec.site(i)
        assert isinstance(mixer, ScalarDecay)
        if mixer.variant != "retnet":
            refuse(spec, i, "mixer", f"fla has no model of {mixer.variant}", "variant: retnet")
        if mixer.head_dim % 2 or mixer.head_dim > 256:
            why = f"fla's rotary takes an even number of up to 256 features, not {mixer.head_dim}"
            refuse(spec, i, "mixer", why, "an even head_dim of at most 256")
        only(spec, i, "mixer", self.title, "variant", "head_dim", "expand", "expand_v")
        heads = mixer.n_heads(site)
        settings = expansions(spec, heads, mixer.head_dim, mixer.d_value(site) // heads) | {"num_heads": heads}
        widths = (heads * mixer.head_dim, heads * mixer.head_dim, mixer.d_value(site))
        renames = {"gate_proj.weight": "g_proj.weight", "norm.weight": "g_norm_swish_gate.weight"}
        return Part(self.kind, settings, split_qkv(widths, renames), (OUTPUT,))

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"use_output_gate": True, "use_short_conv": False, "feature_map": None, "elementwise_affine": True}
        return super().config(spec, layers, {**settings, **fixed})


class FlaDeltaNet(Fla):
    """`DeltaNetForCausalLM` (2406.06484)."""

    title, kind, model_type, architecture = "fla's DeltaNet", "deltanet", "delta_net", "DeltaNetForCausalLM"

    def linear(self, spec: ModelSpec, i: int) -> Part:
        mixer, site = spec.blocks[i].mixer, spec.site(i)
        assert isinstance(mixer, DeltaNet)
        only(spec, i, "mixer", self.title, "head_dim", "expand", "expand_v", "conv", "gate", "neg_eigenvalues")
        heads, K, V = mixer.n_heads(site), mixer.head_dim, mixer.head_v_dim()
        settings = {
            **expansions(spec, heads, K, V),
            "num_heads": heads,
            "conv_size": mixer.conv,
            "use_gate": mixer.gate,
            "allow_neg_eigval": mixer.neg_eigenvalues,
        }
        renames = {"beta_proj.weight": "b_proj.weight", "norm.weight": "o_norm.weight"}
        renames |= {"gate_proj.weight": "g_proj.weight"} if mixer.gate else {}
        return Part(self.kind, settings, split_qkv((heads * K, heads * K, heads * V), renames), (OUTPUT,))

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"use_short_conv": True, "use_beta": True, "use_output_norm": True}
        return super().config(spec, layers, {**settings, **fixed, "qk_norm": "l2", "qk_activation": "silu"})


class FlaGatedDeltaNet(Fla):
    """`GatedDeltaNetForCausalLM` (2412.06464), value heads in groups included."""

    title, kind, model_type = "fla's GatedDeltaNet", "gated_deltanet", "gated_deltanet"
    architecture = "GatedDeltaNetForCausalLM"

    def linear(self, spec: ModelSpec, i: int) -> Part:
        mixer, site = spec.blocks[i].mixer, spec.site(i)
        assert isinstance(mixer, GatedDeltaNet)
        options = ("head_dim", "expand", "expand_v", "value_groups", "conv", "neg_eigenvalues")
        only(spec, i, "mixer", self.title, *options)
        d_key, d_value = mixer.n_k_heads(site) * mixer.head_dim, mixer.n_v_heads(site) * mixer.head_v_dim()
        settings = {
            "head_dim": mixer.head_dim,
            "num_heads": mixer.n_k_heads(site),
            "num_v_heads": mixer.n_v_heads(site),
            "expand_v": share(mixer.head_v_dim(), mixer.head_dim),
            "conv_size": mixer.conv,
            "allow_neg_eigval": mixer.neg_eigenvalues,
        }
        renames = {
            "beta_proj.weight": "b_proj.weight",
            "decay_proj.weight": "a_proj.weight",
            "gate_proj.weight": "g_proj.weight",
            "norm.weight": "o_norm.weight",
        }
        return Part(self.kind, settings, split_qkv((d_key, d_key, d_value), renames), (OUTPUT,))

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"use_short_conv": True, "use_gate": True, "output_gate_activation": "swish"}
        return super().config(spec, layers, {**settings, **fixed})


class FlaKDA(Fla):
    """`KDAForCausalLM` (2510.26692). Its decay has the rank of the values' width, ours of the keys'."""

    title, kind, model_type, architecture = "fla's KDA", "kda", "kda", "KDAForCausalLM"

    def linear(self, spec: ModelSpec, i: int) -> Part:
        mixer, site = spec.blocks[i].mixer, spec.site(i)
        assert isinstance(mixer, KDA)
        only(spec, i, "mixer", self.title, "head_dim", "expand", "expand_v", "conv")
        if mixer.head_v_dim() != mixer.head_dim:
            why = f"the decay of fla's KDA has the rank of its values, {mixer.head_v_dim()}, ours {mixer.head_dim}"
            refuse(spec, i, "mixer", why, "expand_v: 1")
        heads, width = mixer.n_heads(site), mixer.n_heads(site) * mixer.head_dim
        settings = {"head_dim": mixer.head_dim, "num_heads": heads, "expand_v": 1.0, "conv_size": mixer.conv}
        renames = {
            "beta_proj.weight": "b_proj.weight",
            "f_a_proj.weight": "f_proj.0.weight",
            "f_b_proj.weight": "f_proj.1.weight",
            "g_a_proj.weight": "g_proj.0.weight",
            "g_b_proj.weight": "g_proj.1.weight",
            "norm.weight": "o_norm.weight",
        }
        split = split_qkv((width, width, width), renames)

        def tensors(own: Tensors) -> dict[str, Tensor]:
            return {**split(own), "attn.g_proj.1.bias": own["dt_bias"].new_zeros(width)}

        added = {"attn.g_proj.1.bias": "which are a bias of the output gate: zeros"}
        return Part(self.kind, settings, tensors, (OUTPUT,), added)

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"use_short_conv": True, "allow_neg_eigval": False, "safe_gate": False, "lower_bound": None}
        return super().config(spec, layers, {**settings, **fixed, "num_v_heads": None})


class FlaSamba(Fla):
    """`SambaForCausalLM` (2406.07522): Mamba and attention, with an FFN whose width is a multiple of 256."""

    title, kind, model_type, architecture = "fla's Samba", "mamba", "samba", "SambaForCausalLM"
    part = "mixer."
    names: ClassVar[Names] = Names(
        {"mixer_norm": "mixer_norm.weight", "ffn_norm": "mlp_norm.weight"},
        embed="backbone.embeddings.weight",
        layer=BACKBONE,
        final_norm="backbone.norm_f.weight",
    )

    def linear(self, spec: ModelSpec, i: int) -> Part:
        mixer, site = spec.blocks[i].mixer, spec.site(i)
        assert isinstance(mixer, Mamba)
        only(spec, i, "mixer", self.title, "expand", "d_state", "conv", "dt_rank")
        settings = {
            "expand": share(mixer.d_inner(site), site.d_model),
            "state_size": mixer.d_state,
            "conv_kernel": mixer.conv,
            "time_step_rank": mixer.rank(site),
        }
        renames = {
            "conv_weight": "conv1d.weight",
            "conv_bias": "conv1d.bias",
            "dt_bias": "dt_proj.bias",
            "o_proj.weight": "out_proj.weight",
        }
        return Part(self.kind, settings, with_names(renames, self.part), ("mixer.out_proj.weight",))

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        made = super().ffn(spec, i)
        width = made.settings["intermediate_size"]
        if width % 256:
            why = f"the width of an FFN of {self.title} is a multiple of 256, not {width}"
            refuse(spec, i, "ffn", why, f"an expand of {256 * math.ceil(width / 256)}/{spec.d_model}")
        return Part(made.kind, {"hidden_ratio": 1.5 * width / spec.d_model}, made.tensors, made.outputs)

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"use_bias": False, "use_conv_bias": True, "residual_in_fp32": False}
        return super().config(spec, layers, {**settings, **fixed})


class FlaMamba2(Fla):
    """`Mamba2ForCausalLM` (2405.21060): nothing but Mamba-2, without FFNs."""

    title, kind, model_type, architecture = "fla's Mamba-2", "mamba2", "mamba2", "Mamba2ForCausalLM"
    names: ClassVar[Names] = Names(
        {"mixer_norm": "norm.weight"},
        embed="backbone.embeddings.weight",
        layer=BACKBONE,
        final_norm="backbone.norm_f.weight",
    )

    def mixer(self, spec: ModelSpec, i: int) -> Part:
        mixer, site = spec.blocks[i].mixer, spec.site(i)
        if not isinstance(mixer, Mamba2):
            refuse(spec, i, "mixer", f"{self.title} has no other mixer", "mamba2 in every block")
        only(spec, i, "mixer", self.title, "head_dim", "expand", "d_state", "n_groups", "conv")
        if 1 < mixer.groups(site) < mixer.n_heads(site):
            why = (
                "fla's own code, without mamba-ssm, deals groups out to heads in a prompt as it does not when decoding"
            )
            refuse(spec, i, "mixer", why, "n_groups: 1")
        settings = {
            "head_dim": mixer.head_dim,
            "expand": share(mixer.d_inner(site), site.d_model),
            "state_size": mixer.d_state,
            "n_groups": mixer.groups(site),
            "conv_kernel": mixer.conv,
        }
        renames = {
            "conv_weight": "conv1d.weight",
            "conv_bias": "conv1d.bias",
            "norm_weight": "norm.weight",
            "o_proj.weight": "out_proj.weight",
        }
        return Part(self.kind, settings, with_names(renames, "mixer."), ("mixer.out_proj.weight",))

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        if spec.blocks[i].ffn.kind != "none":
            refuse(spec, i, "ffn", f"blocks of {self.title} have no FFN", "kind: none")
        return Part("none", {}, lambda own: {}, ())

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"use_bias": False, "use_conv_bias": True, "rmsnorm": True, "norm_before_gate": False}
        made = super().config(spec, layers, {**settings, **fixed, "D_has_hdim": False, "hidden_act": "silu"})
        return {key: value for key, value in made.items() if key not in ("attn", "attnres_block_size")}


MODELS: Mapping[str, type[Fla]] = {
    model.kind: model for model in (FlaGLA, FlaRetNet, FlaDeltaNet, FlaGatedDeltaNet, FlaKDA, FlaSamba, FlaMamba2)
}


def expansions(spec: ModelSpec, heads: int, key_dim: int, value_dim: int) -> dict[str, float]:
    """Widths of all keys and of all values, as shares of d_model."""
    return {"expand_k": heads * key_dim / spec.d_model, "expand_v": heads * value_dim / spec.d_model}


def with_names(renames: Mapping[str, str], part: str = "attn.") -> Callable[[Tensors], dict[str, Tensor]]:
    """Every tensor under its own name or the one in `renames`; taps [C, W] as nn.Conv1d has them, [C, 1, W]."""

    def tensors(own: Tensors) -> dict[str, Tensor]:
        return {part + renames.get(name, name): t[:, None] if name == "conv_weight" else t for name, t in own.items()}

    return tensors


def split_qkv(widths: tuple[int, int, int], renames: Mapping[str, str]) -> Callable[[Tensors], dict[str, Tensor]]:
    """The joint projection and the joint convolution apart, `widths` outputs each; the rest as `with_names` has it."""
    rest = with_names(renames)

    def tensors(own: Tensors) -> dict[str, Tensor]:
        import torch

        made = rest({name: t for name, t in own.items() if name not in ("qkv_proj.weight", "conv_weight")})
        for name, weight in zip("qkv", torch.split(own["qkv_proj.weight"], list(widths)), strict=True):
            made[f"attn.{name}_proj.weight"] = weight
        if "conv_weight" in own:
            for name, taps in zip("qkv", torch.split(own["conv_weight"], list(widths)), strict=True):
                made[f"attn.{name}_conv1d.weight"] = taps[:, None]
        return made

    return tensors


def attention_tensors(part: str, mixer: Attention) -> Callable[[Tensors], dict[str, Tensor]]:
    """Same names. fla's norms of queries and keys have a larger eps; what they norm is larger in the same measure."""
    scale = math.sqrt(FLA_EPS / EPS) if mixer.qk_norm else 1.0

    def tensors(own: Tensors) -> dict[str, Tensor]:
        normed = ("q_proj.weight", "k_proj.weight")
        return {part + name: t * scale if name in normed else t for name, t in own.items()}

    return tensors
