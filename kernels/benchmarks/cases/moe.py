"""A mixture-of-experts layer after its router: training at the size of current models, a proxy, decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.moe import grouped_mm, moe, reference, route


def inputs(N: int, E: int, k: int, D: int, width: int, learn: bool = True) -> Inputs:
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=make, device="cuda").mul(scale).bfloat16().requires_grad_(learn)

    logits = torch.randn(N, E, generator=make, device="cuda") + torch.randn(E, generator=make, device="cuda") * 0.3
    weights, chosen = logits.softmax(-1).topk(k, dim=-1)
    return {
        "x": normal(N, D),
        "weights": (weights / weights.sum(-1, keepdim=True)).requires_grad_(learn),
        "chosen": chosen,
        "gate_proj": normal(E, width, D, scale=D**-0.5),
        "up_proj": normal(E, width, D, scale=D**-0.5),
        "down_proj": normal(E, D, width, scale=width**-0.5),
    }


PEERS: dict[str, Callable[..., Any]] = {
    "torch grouped_mm": reference.moe,
    "our kernels, products in Triton": partial(moe, products="triton"),
    "our kernels, products by torch": partial(moe, products="torch"),
}


def measure_plans(N: int, E: int, k: int, D: int, width: int) -> dict[str, float]:
    """Milliseconds of forward and backward: all products by torch, by Triton, and all but one by torch.

    What comes out goes to `parallel.PLANS`: a stage whose row beats "torch" is better made by Triton.
    """
    from triton.testing import do_bench

    from archsearch_kernels.moe import parallel

    given = inputs(N, E, k, D, width)
    cotangent = torch.randn_like(given["x"])
    key = (E, D, width, 1 << (N * k - 1).bit_length())
    before = parallel.PLANS.pop(key, None)
    stages = {n: getattr(parallel, n) for n in ("FIRST", "DOWN", "DH", "DX", "DW")}
    plans = {"torch": parallel.ALL, "triton": 0, **{f"not {n}": parallel.ALL & ~bit for n, bit in stages.items()}}

    def step() -> None:
        for tensor in given.values():
            tensor.grad = None
        moe(**given).backward(cotangent)

    found = {}
    for name, plan in plans.items():
        parallel.PLANS[key] = plan
        found[name] = float(do_bench(step, warmup=50, rep=200, return_mode="median"))
    del parallel.PLANS[key]
    if before is not None:
        parallel.PLANS[key] = before
    return found


def case(N: int, E: int, k: int, D: int, width: int, **options: Any) -> Case:
    M = N * k
    product = 2.0 * M * D * width
    busy = E * (1 - (1 - k / E) ** N)  # experts whose matrices must be read
    matrices = 2.0 * 3 * busy * D * width
    learn = options.get("backward", True)
    return Case(
        op="moe",
        shape=f"N{N} E{E} k{k} D{D} F{width}",
        inputs=lambda: inputs(N, E, k, D, width, learn),
        run=moe,
        reference=reference.moe,
        small=lambda: inputs(min(N, 300), min(E, 8), min(k, 4), min(D, 256), min(width, 128), learn),
        peers=PEERS,
        flops=(3 * product, 9 * product),
        bytes=(matrices + 4.0 * N * D, 3 * matrices + 8.0 * N * D),
        **options,
    )


def product_case(M: int, E: int, into: int, out: int) -> Case:
    """The grouped product alone, against torch's."""

    def make(rows: int, experts: int) -> Inputs:
        generator = torch.Generator("cuda").manual_seed(0)
        share = torch.randint(0, experts, (rows,), generator=generator, device="cuda")
        x = torch.randn(rows, into, generator=generator, device="cuda").bfloat16().requires_grad_()
        weight = torch.randn(experts, out, into, generator=generator, device="cuda").mul(into**-0.5).bfloat16()
        return {"x": x, "weight": weight.requires_grad_(), "counts": torch.bincount(share, minlength=experts)}

    flops = 2.0 * M * into * out
    floor = 2.0 * (M * into + M * out + E * into * out)
    return Case(
        op="grouped_mm",
        shape=f"M{M} E{E} {into}x{out}",
        inputs=lambda: make(M, E),
        run=partial(grouped_mm, products="triton"),
        reference=reference.grouped_mm,
        small=lambda: make(min(M, 1000), min(E, 8)),
        peers={"torch grouped_mm": lambda x, weight, counts: F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).int())},
        flops=(flops, 3 * flops),
        bytes=(floor, 2 * floor),
        against="torch grouped_mm",
        goal=1.2,
    )


def route_case(N: int, E: int, k: int) -> Case:
    def make(rows: int) -> Inputs:
        return {"logits": torch.randn(rows, E, device="cuda").requires_grad_()}

    return Case(
        op="moe_route",
        shape=f"N{N} E{E} k{k}",
        inputs=lambda: make(N),
        run=lambda logits: route(logits, k),
        reference=lambda logits: reference.route(logits, k),
        small=lambda: make(100),
        peers={"torch": lambda logits: reference.route(logits, k)},
        bytes=(N * (4.0 * E + 12 * k), N * (12.0 * E + 16 * k)),
        against="torch",
        goal=1.0,
    )


DECODE: dict[str, Any] = {"backward": False, "graphed": True}

CASES: list[Case] = [
    case(16384, 64, 8, 2048, 1024, against="torch grouped_mm", goal=1 / 1.2),
    case(16384, 64, 8, 2048, 512, against="torch grouped_mm", goal=1 / 1.2),
    case(32768, 8, 2, 1024, 2048, against="torch grouped_mm", goal=1 / 1.1),
    case(8192, 8, 2, 256, 512, against="torch grouped_mm", goal=1 / 1.5),
    product_case(131072, 64, 2048, 1024),
    route_case(16384, 64, 8),
    *(case(N, 64, 8, 2048, 1024, against="torch grouped_mm", goal=1.0, **DECODE) for N in (1, 8, 64)),
]
