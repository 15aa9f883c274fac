"""Falcon-H1 (2507.22448) as transformers has it: Mamba-2 and attention side by side in every block, outputs summed.

Its multipliers are all 1 but that of the embedding, which is the search model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.attention import heads
from archsearch.export.dialects.base import EPS, Dialect, Layer, Names, Part, only, refuse
from archsearch.export.dialects.feedforward import swiglu
from archsearch.export.dialects.parts import QKVO, mapped, rotates_all
from archsearch.mixers.attention import Attention
from archsearch.mixers.mamba2 import Mamba2
from archsearch.mixers.parallel import Parallel

MAMBA = {
    "in_proj.weight": "mamba.in_proj.weight",
    "conv_weight": "mamba.conv1d.weight",
    "conv_bias": "mamba.conv1d.bias",
    "dt_bias": "mamba.dt_bias",
    "A_log": "mamba.A_log",
    "D": "mamba.D",
    "norm_weight": "mamba.norm.weight",
    "o_proj.weight": "mamba.out_proj.weight",
}
MULTIPLIERS = ("lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")  # all 1
BOTH = "kind: parallel, fuse: sum, of one mamba2 and one attention"


class FalconH1(Dialect):
    """FalconH1ForCausalLM: every block has both mixers, in either order."""

    name = "falcon_h1"
    title = "Falcon-H1"
    names: ClassVar[Names] = Names(
        norms={"mixer_norm": "input_layernorm.weight", "ffn_norm": "pre_ff_layernorm.weight"},
        final_norm="model.final_layernorm.weight",
    )

    def mixer(self, spec: ModelSpec, i: int) -> Part:
        mixer = spec.blocks[i].mixer
        if not isinstance(mixer, Parallel):
            refuse(spec, i, "mixer", "every block of Falcon-H1 has a Mamba-2 and an attention side by side", BOTH)
        if sorted(branch.kind for branch in mixer.of) != ["attention", "mamba2"] or mixer.fuse != "sum":
            found = f"{mixer.fuse} of {', '.join(branch.kind for branch in mixer.of)}"
            refuse(spec, i, "mixer", f"Falcon-H1 sums a Mamba-2 and an attention, this is {found}", BOTH)
        settings: dict[str, Any] = {}
        names: dict[str, str] = {}
        for branch, own in enumerate(mixer.of):
            block = replace(spec.blocks[i], mixer=own)  # what is wrong with a branch is told by its own kind
            made, renaming = self._branch(replace(spec, blocks=(*spec.blocks[:i], block, *spec.blocks[i + 1 :])), i)
            settings |= made
            names |= {f"mixers.{branch}.{ours}": theirs for ours, theirs in renaming.items()}
        taps = next(ours for ours, theirs in names.items() if theirs == MAMBA["conv_weight"])
        outputs = ("mamba.out_proj.weight", "self_attn.o_proj.weight")
        return Part("hybrid", settings, mapped(names, taps), outputs)

    def _branch(self, spec: ModelSpec, i: int) -> tuple[dict[str, Any], dict[str, str]]:
        """Settings and names of one of the two, which stands alone in block i of `spec`."""
        own, site = spec.blocks[i].mixer, spec.site(i)
        if isinstance(own, Mamba2):
            only(spec, i, "mixer", self.title, "head_dim", "expand", "d_state", "n_groups", "conv")
            settings = {
                "mamba_d_ssm": own.d_inner(site),
                "mamba_n_heads": own.n_heads(site),
                "mamba_d_head": own.head_dim,
                "mamba_n_groups": own.groups(site),
                "mamba_d_state": own.d_state,
                "mamba_d_conv": own.conv,
            }
            return settings, MAMBA
        assert isinstance(own, Attention)
        rotates_all(spec, i, self.title, own)
        only(spec, i, "mixer", self.title, "head_dim", "expand", "kv_groups", "rope_theta", "rope_fraction")
        return {**heads(spec, i, own), "rope_theta": own.rope_theta}, QKVO

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        return swiglu(spec, i, self.title, prefix="feed_forward.")

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(settings)
        rope = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
        return {
            "model_type": self.name,
            "architectures": ["FalconH1ForCausalLM"],
            "hidden_act": "silu",
            "rms_norm_eps": EPS,
            "embedding_multiplier": self.embed_scale(spec),
            "mlp_multipliers": [1.0] * 2,
            "ssm_multipliers": [1.0] * 5,
            **{f"{name}_multiplier": 1.0 for name in MULTIPLIERS},
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_conv_bias": True,
            **dict.fromkeys(("mamba_proj_bias", "projectors_bias", "attention_bias", "mlp_bias"), False),
            "rope_parameters": rope,
            **given,
        }

    def embed_scale(self, spec: ModelSpec) -> float:
        from archsearch.model import EMBED_STD

        return 1.0 / EMBED_STD

    def stock_class(self, config: Mapping[str, Any]) -> Any:
        from transformers import FalconH1ForCausalLM

        return FalconH1ForCausalLM
