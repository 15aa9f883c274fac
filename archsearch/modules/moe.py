"""Dropless mixture of experts with softmax (2101.03961, 2401.04088) or bias-balanced sigmoid routing (2408.15664)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.modules.swiglu import SwiGLU
from archsearch_kernels.moe import moe, route


class MoE(nn.Module):
    """y = sum over the chosen experts of weight x expert(x), x [B, T, D]; `n_shared` more take every token.

    After a forward in training mode `router_loss` is what this layer adds to the loss (softmax routing), else None.
    With sigmoid routing call `update_bias` once after each optimiser step. The router computes in fp32.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        n_experts: int,
        top_k: int,
        n_shared: int = 0,
        routing: str = "softmax",
        aux_loss: float = 0.01,
        z_loss: float = 1e-3,
        route_scale: float = 1.0,
        bias_rate: float = 1e-3,
        normalize: bool = True,
        norm_eps: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.top_k = top_k
        self.routing = routing
        self.aux_loss = aux_loss
        self.z_loss = z_loss
        self.route_scale = route_scale
        self.bias_rate = bias_rate
        self.normalize = normalize
        self.norm_eps = norm_eps or None
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(n_experts, d_hidden, d_model))
        self.up_proj = nn.Parameter(torch.empty(n_experts, d_hidden, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, d_hidden))
        self.shared = SwiGLU(d_model, n_shared * d_hidden) if n_shared else None
        if routing == "sigmoid":
            self.bias: Tensor = nn.Buffer(torch.zeros(n_experts))
            self.load: Tensor = nn.Buffer(torch.zeros(n_experts, dtype=torch.long), persistent=False)
        self.router_loss: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1 / fan-in) for each expert."""
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            if not weight.is_meta:  # torch draws normals on meta by importing torch._dynamo (seconds)
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        if self.routing == "sigmoid":  # no bias towards any expert
            self.bias.zero_()
            self.load.zero_()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self._route(tokens)
        y = moe(tokens, weights, chosen, self.gate_proj, self.up_proj, self.down_proj)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view(x.shape)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, k] in fp32 (or wider) and the chosen experts [N, k]."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.to(wide), self.router.weight.to(wide))  # [N, E]
            weights, chosen, counts = route(
                logits,
                self.top_k,
                self.routing,
                self.bias if self.routing == "sigmoid" else None,
                self.route_scale,
                self.normalize,
                self.norm_eps,
            )
            self.router_loss = None
            if self.training and self.routing == "softmax":
                uneven = self.n_experts * (counts / chosen.numel() * logits.softmax(-1).mean(0)).sum()
                self.router_loss = self.aux_loss * uneven + self.z_loss * logits.logsumexp(-1).square().mean()
            elif self.training:
                self.load += counts
        return weights, chosen

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the bias towards experts that got fewer tokens than the mean since the last call."""
        if self.routing == "sigmoid":
            load = self.load.to(torch.float32)
            self.bias += self.bias_rate * (load.mean() - load).sign()
            self.load.zero_()
