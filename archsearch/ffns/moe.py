"""Mixture of experts: softmax top-k (2006.16668, 2101.03961, 2401.04088) or the sigmoid of DeepSeek-V3 (2412.19437)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from archsearch.contract import FFNSpec, ModuleCall, Site
from archsearch.quantity import Number, round_to


class MoE(FFNSpec):
    """Each token passes top_k of n_experts SwiGLU experts, and n_shared more that every token passes.

    Fine-grained experts (2401.06066) are many experts of a small `expand`, hidden width of one expert / d_model.
    No token is ever dropped and each is routed by itself alone, so that training, prefill and decode agree.

    routing: `softmax` adds aux_loss and z_loss to the loss, for each layer by itself. `sigmoid` adds nothing: experts
    are chosen by score + bias, and after each optimiser step the bias moves by bias_rate towards those with too few
    tokens (2408.15664).
    normalize: the weights of the chosen sum to route_scale; a single one keeps its own score instead, or its router
    would have no gradient. false: any number keep their own scores, times route_scale, as in Jamba (2403.19887).
    norm_eps: added to the sum that they are divided by, 1e-6 in LFM2-8B-A1B.
    aux_loss: factor of E sum_i f_i P_i (f_i: share of choices that fell on expert i, P_i: its mean probability), which
    is 1 at perfect balance; softmax only.
    z_loss: factor of mean((logsumexp of the router's logits)^2) (2202.08906); softmax only.
    """

    kind: Literal["moe"] = "moe"
    n_experts: Annotated[int, Field(ge=1)] = 8
    """experts that the router chooses from"""
    top_k: Annotated[int, Field(ge=1)] = 2
    """experts that a token passes"""
    n_shared: Annotated[int, Field(ge=0)] = 0
    """experts that every token passes besides"""
    expand: Annotated[Number, Field(gt=0)] = 4 / 3
    """hidden width of one expert / d_model"""
    routing: Literal["softmax", "sigmoid"] = "softmax"
    """balanced by a loss (softmax) or by a bias (sigmoid)"""
    normalize: bool = True
    """weights of the chosen sum to route_scale"""
    norm_eps: Annotated[Number, Field(ge=0)] = 0.0
    """added to the sum that they are divided by"""
    aux_loss: Annotated[Number, Field(ge=0)] = 0.01
    """weight of the balancing loss (softmax)"""
    z_loss: Annotated[Number, Field(ge=0)] = 1e-3
    """weight of the loss on large router logits (softmax)"""
    route_scale: Annotated[Number, Field(gt=0)] = 1.0
    """factor on the weights of the chosen"""
    bias_rate: Annotated[Number, Field(ge=0)] = 1e-3
    """step of the balancing bias (sigmoid)"""

    def d_hidden(self, site: Site) -> int:
        """Hidden width of one expert at this site, a multiple of 16."""
        return round_to(self.expand * site.d_model, 16)

    def check(self, site: Site) -> None:
        if self.top_k > self.n_experts:
            raise ValueError(
                f"top_k {self.top_k} is more than n_experts {self.n_experts}; write at most {self.n_experts}"
            )

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.moe:MoE",
            {
                "d_model": site.d_model,
                "d_hidden": self.d_hidden(site),
                "n_experts": self.n_experts,
                "top_k": self.top_k,
                "n_shared": self.n_shared,
                "routing": self.routing,
                "normalize": self.normalize,
                "norm_eps": self.norm_eps,
                "aux_loss": self.aux_loss,
                "z_loss": self.z_loss,
                "route_scale": self.route_scale,
                "bias_rate": self.bias_rate,
            },
        )

    def _params(self, site: Site, n_routed: int) -> int:
        expert = 3 * site.d_model * self.d_hidden(site)
        return (n_routed + self.n_shared) * expert + site.d_model * self.n_experts

    def num_params(self, site: Site) -> int:
        return self._params(site, self.n_experts)

    def active_params(self, site: Site) -> int:
        """The router, top_k experts and the shared ones."""
        return self._params(site, self.top_k)

    def flops(self, site: Site, n_tokens: int) -> int:
        return 2 * n_tokens * self.active_params(site)
