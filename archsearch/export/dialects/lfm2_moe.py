"""LFM2 with experts (LFM2-8B-A1B) as transformers has it: dense blocks first, then sigmoid routing with a bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.base import Layer, Part, Tensors, only, refuse
from archsearch.export.dialects.lfm2 import Lfm2
from archsearch.export.dialects.parts import ONLY_THE_LOSS, stacked
from archsearch.ffns.moe import MoE

if TYPE_CHECKING:
    from torch import Tensor

SUM_EPS = 1e-6


class Lfm2Moe(Lfm2):
    """Lfm2MoeForCausalLM; it divides the weights of the chosen experts by their sum plus 1e-6 or leaves them alone."""

    name = "lfm2_moe"
    title = "LFM2-MoE"

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        ffn = spec.blocks[i].ffn
        if not isinstance(ffn, MoE):
            if i and isinstance(spec.blocks[i - 1].ffn, MoE):
                refuse(spec, i, "ffn", f"{self.title} has its dense blocks before those with experts", "kind: moe")
            return super().ffn(spec, i)
        if ffn.routing != "sigmoid":
            refuse(spec, i, "ffn", f"the router of {self.title} is a sigmoid, not a {ffn.routing}", "routing: sigmoid")
        is_normed = ffn.normalize and ffn.top_k > 1  # a single one keeps its own score
        if is_normed and ffn.norm_eps != SUM_EPS:
            why = f"{self.title} adds 1e-6 to the sum that it divides its {ffn.top_k} weights by, not {ffn.norm_eps:g}"
            refuse(spec, i, "ffn", why, "norm_eps: 1e-6 (or normalize: false, or top_k: 1)")
        options = ("n_experts", "top_k", "expand", "routing", "normalize", "norm_eps", "route_scale")
        only(spec, i, "ffn", self.title, *options, *ONLY_THE_LOSS)
        settings = {
            "moe_intermediate_size": ffn.d_hidden(spec.site(i)),
            "num_experts": ffn.n_experts,
            "num_experts_per_tok": ffn.top_k,
            "norm_topk_prob": is_normed,
            "routed_scaling_factor": ffn.route_scale,
        }
        return Part("moe", settings, _tensors, ("feed_forward.experts.down_proj",))

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        made = super().config(spec, layers, settings)
        del made["block_auto_adjust_ff_dim"]  # here the width is always as written
        return made | {
            "architectures": ["Lfm2MoeForCausalLM"],
            "num_dense_layers": sum(layer.ffn.kind == "dense" for layer in layers),
            "use_expert_bias": True,
        }

    def stock_class(self, config: Mapping[str, Any]) -> Any:
        from transformers import Lfm2MoeForCausalLM

        return Lfm2MoeForCausalLM


def _tensors(own: Tensors) -> dict[str, Tensor]:
    router = {"feed_forward.gate.weight": own["router.weight"], "feed_forward.expert_bias": own["bias"]}
    return router | stacked(own, "feed_forward.experts.")
