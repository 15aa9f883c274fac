"""Gradients of log decays in bf16, alone and added up over tokens, as a parameter behind them gets them.

What a decay gets is a difference: of all that is read behind it and all that is written before it. If the two sides
round a pair of tokens differently, the sum over tokens holds what was rounded off and little else.
"""

import math

import pytest
import torch
from kernel_checks import DEVICE, error

from archsearch_kernels.delta_rule import delta_rule
from archsearch_kernels.gla import gla
from archsearch_kernels.kda import kda
from archsearch_kernels.scalar_decay import scalar_decay

B, T, H, D = 2, 96, 4, 64
RATES = torch.tensor([1.0, 4.0, 9.0, 16.0])  # a head: Mamba-2's start


def operands(vector_gates: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = draw(B, T, H, D), draw(B, T, H, D), 0.3 * draw(B, T, H, D)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    shape = (B, T, H, D) if vector_gates else (B, T, H)
    steps = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(shape, generator=generator))
    beta = torch.rand(B, T, H, generator=generator).clamp(0.3, 0.7)
    found = {"q": q, "k": k, "v": v, "beta": beta}
    rates = RATES[:, None] if vector_gates else RATES
    return {n: x.bfloat16().to(DEVICE) for n, x in found.items()} | {"g": (-rates * steps).to(DEVICE)}


def gradient(op, given, d_o, implementation):
    given = {n: x.detach().clone().requires_grad_() for n, x in given.items()}
    out = op(**given, implementation=implementation)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(d_o.to(out.dtype))
    return given["g"].grad.double()


@pytest.mark.parametrize("op", [delta_rule, gla, kda, scalar_decay], ids=lambda op: op.__name__)
def test_a_decays_gradient_is_no_difference_of_roundings(op) -> None:
    given = operands(vector_gates=op in (gla, kda))
    if op in (gla, scalar_decay):
        del given["beta"]
    d_o = torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    exact = gradient(op, {n: x.float() for n, x in given.items()}, d_o, "reference")
    found = gradient(op, given, d_o, "triton")
    for h in range(H):
        assert error(found[:, :, h], exact[:, :, h]) < 4.5e-3, h
    dims = [d for d in range(exact.dim()) if d != 2]
    rates, exact_rates = ((x * given["g"]).sum(dims) for x in (found, exact))  # gradients of the rates' logarithms
    assert ((rates - exact_rates).abs() < 2.5e-2 * exact_rates.abs().mean()).all(), (rates, exact_rates)
