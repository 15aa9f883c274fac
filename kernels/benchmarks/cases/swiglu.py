"""SwiGLU's elementwise part, of two tensors and of one that holds both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.swiglu import reference, swiglu, swiglu_packed


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def pair(N: int, width: int) -> Inputs:
    torch.manual_seed(0)
    return {"gate": normal(N, width), "up": normal(N, width)}


def one(N: int, width: int) -> Inputs:
    torch.manual_seed(0)
    return {"x": normal(N, 2 * width)}


def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger(gate: Tensor, up: Tensor) -> Any:
    """Its backward writes over the inputs, which only changes the numbers that are timed."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)  # type: ignore[no-untyped-call]


def fla(gate: Tensor, up: Tensor) -> Any:
    from fla.modules.activations import swiglu as theirs

    return theirs(gate, up)


def case(N: int, width: int, packed: bool = False) -> Case:
    tensor = 2.0 * N * width  # bytes
    make = one if packed else pair
    peers: dict[str, Any] = {"torch": torch_swiglu, "fla": fla, "Liger": liger}
    return Case(
        op="swiglu",
        shape=f"N{N} F{width}" + (" packed" if packed else ""),
        inputs=lambda: make(N, width),
        run=swiglu_packed if packed else swiglu,
        reference=reference.swiglu_packed if packed else reference.swiglu,
        small=lambda: make(301, width),
        peers={"torch": reference.swiglu_packed} if packed else peers,
        bytes=(3 * tensor, 8 * tensor),
        against="torch",
        goal=0.8,
    )


CASES = [case(16384, 5632), case(16384, 5632, packed=True), case(8192, 768)]
