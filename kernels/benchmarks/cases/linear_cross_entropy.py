"""Linear cross-entropy at the head of a 1-2 B model, against Liger's and torch's with the logits in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.linear_cross_entropy import linear_cross_entropy, reference


def inputs(N: int, V: int, C: int, weight: torch.dtype = torch.bfloat16) -> Inputs:
    make = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(N, C, generator=make, device="cuda").mul(0.5).bfloat16()
    w = torch.randn(V, C, generator=make, device="cuda").mul(0.02).to(weight)
    targets = torch.randint(0, V, (N,), generator=make, device="cuda")
    return {"x": x.requires_grad_(), "weight": w.requires_grad_(), "targets": targets}


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight.to(x.dtype), x, targets)


def torch_full(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.to(x.dtype).T).float(), targets)


def fla(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from fla.modules import FusedLinearCrossEntropyLoss

    return FusedLinearCrossEntropyLoss()(x, targets, weight.to(x.dtype))


PEERS = {"liger": liger, "torch": torch_full, "fla": fla}


def peak_bytes(run: Callable[..., Tensor], given: Inputs) -> int:
    """Memory that forward and backward take beyond what was there before, gradients included."""

    def step() -> None:
        for tensor in given.values():
            tensor.grad = None
        run(**given).backward()

    step()  # workspaces of the libraries stay
    for tensor in given.values():
        tensor.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory(N: int = 16384, V: int = 32768, C: int = 2048) -> dict[str, float]:
    """MiB of forward and backward, ours and each peer's that can be imported."""
    found = {}
    for name, run in {"ours": linear_cross_entropy, **PEERS}.items():
        try:
            found[name] = peak_bytes(run, inputs(N, V, C)) / 2**20
        except (ImportError, RuntimeError) as error:
            print(f"{name}: {error}")
        torch.cuda.empty_cache()
    return found


def case(N: int, V: int, C: int, weight: torch.dtype = torch.bfloat16, **goal: Any) -> Case:
    product = 2.0 * N * V * C
    size = weight.itemsize
    return Case(
        op="linear_cross_entropy",
        shape=f"N{N} V{V} C{C}" + ("" if weight == torch.bfloat16 else " weight fp32"),
        inputs=lambda: inputs(N, V, C, weight),
        run=linear_cross_entropy,
        reference=reference.linear_cross_entropy,
        small=lambda: inputs(min(N, 1000), min(V, 5003), min(C, 256), weight),
        peers=PEERS,
        flops=(product, 3 * product),
        bytes=(2.0 * N * C + size * V * C, 4.0 * N * C + 2 * size * V * C),
        **goal,
    )


CASES: list[Case] = [
    case(16384, 32768, 2048, against="liger", goal=1.0),
    case(16384, 32768, 2048, torch.float32, against="liger", goal=1.1),
    case(8192, 50257, 2048, against="torch", goal=1.1),
    case(8192, 32768, 256, torch.float32, against="torch", goal=1.0),
]
