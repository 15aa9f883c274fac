"""RMSNorm: of the residual stream, of a sum with the residual, of heads, with a gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.rms_norm import add_rms_norm, gated_rms_norm, l2_norm, reference, rms_norm


def make(N: int, C: int, other: str | None = None) -> Inputs:
    torch.manual_seed(0)
    names = ["x"] if other is None else ["x", other]
    given = {n: torch.randn(N, C, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in names}
    return given | {"weight": torch.randn(C, device="cuda", dtype=torch.bfloat16).requires_grad_()}


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def torch_add_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, 1e-6), h


def torch_gated(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6) * F.silu(gate)


def liger(x: Tensor, weight: Tensor) -> Any:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)  # type: ignore[no-untyped-call]


def fla_add_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
    from fla.modules.norm.layernorm import rms_norm as theirs

    return theirs(x, weight, None, residual, 1e-6, prenorm=True)


def fla_gated(x: Tensor, weight: Tensor, gate: Tensor) -> Any:
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    return rms_norm_gated(x, gate, weight, None, "swish", eps=1e-6)


def torch_unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def unit(N: int, C: int) -> Case:
    one = 2.0 * N * C
    return Case(
        op="l2_norm",
        shape=f"N{N} C{C}",
        inputs=lambda: {"x": make(N, C)["x"]},
        run=l2_norm,
        reference=reference.l2_norm,
        small=lambda: {"x": make(301, C)["x"]},
        peers={"torch": torch_unit},
        bytes=(2 * one, 5 * one),
        against="torch",
        goal=1.0,
    )


def norm(N: int, C: int, other: str | None = None) -> Case:
    one = 2.0 * N * C  # bytes of a tensor
    run, truth, peers, moved = {
        None: (rms_norm, reference.rms_norm, {"torch": torch_norm, "Liger": liger}, (2, 5)),
        "residual": (add_rms_norm, reference.add_rms_norm, {"torch": torch_add_norm, "fla": fla_add_norm}, (4, 7)),
        "gate": (gated_rms_norm, reference.gated_rms_norm, {"torch": torch_gated, "fla": fla_gated}, (3, 8)),
    }[other]
    return Case(
        op="rms_norm" if other != "gate" else "gated_rms_norm",
        shape=f"N{N} C{C}" + (" with residual" if other == "residual" else ""),
        inputs=lambda: make(N, C, other),
        run=run,
        reference=truth,
        small=lambda: make(301, C, other),
        peers=peers,
        bytes=(moved[0] * one, moved[1] * one),
        against="torch",
        goal=1.0,
    )


CASES = [
    norm(16384, 2048),
    norm(16384, 2048, "residual"),
    norm(16384, 2048, "gate"),
    norm(262144, 128),
    norm(262144, 128, "gate"),
    norm(4096, 16384),
    norm(8192, 256),
    unit(262144, 128),
]
