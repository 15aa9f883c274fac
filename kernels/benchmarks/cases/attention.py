"""Softmax attention: causal, grouped, windowed, with a sink, packed; decoding over a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Inputs
from torch import Tensor

from archsearch_kernels.attention import attention, attention_recurrent, reference

OURS = "our Triton kernels"
CUDNN, FLASH, FLEX = "SDPA cuDNN", "SDPA flash", "FlexAttention compiled"


def inputs(B: int, T: int, H: int, G: int, D: int, sink: bool = False, documents: int = 0) -> Inputs:
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device="cuda").bfloat16().requires_grad_()

    given: Inputs = {"q": normal(B, T, H, D), "k": normal(B, T, G, D), "v": normal(B, T, G, D)}
    if sink:
        given["sink"] = torch.randn(H, generator=make, device="cuda").requires_grad_()
    if documents:
        at = torch.arange(T, device="cuda", dtype=torch.int32)
        given["seq_idx"] = (at * documents // T).expand(B, T).contiguous()
    return given


def torchs(backend: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)

    return run


PEERS = {CUDNN: torchs("CUDNN_ATTENTION"), FLASH: torchs("FLASH_ATTENTION")}


@cache
def flex_of(T: int, window: int) -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < window)

    return torch.compile(flex_attention, dynamic=False), create_block_mask(seen, None, None, T, T, device="cuda")


def flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    run, mask = flex_of(q.shape[1], window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def case(
    B: int = 2,
    T: int = 8192,
    H: int = 16,
    G: int = 16,
    D: int = 128,
    *,
    window: int | None = None,
    sink: bool = False,
    documents: int = 0,
    forced: bool = True,
    note: str = "",
    **options: Any,
) -> Case:
    span = T // documents if documents else T
    w = min(window or span, span)
    pairs = B * H * T * (w - w * w / (2 * span))  # half of the square, or the band
    numbers = B * T * D * (2 * H + 2 * G)  # q, o; k, v
    return Case(
        op="attention",
        shape=f"B{B} T{T} H{H} G{G} D{D}" + (f" window {window}" if window else "") + note,
        inputs=partial(inputs, B, T, H, G, D, sink, documents),
        run=partial(attention, window=window, implementation="triton" if forced else None),
        reference=partial(reference.attention, window=window),
        small=partial(inputs, 1, 777, min(H, 4), min(G, 4) if G == H else 1, D, sink, min(documents, 3)),
        flops=(4.0 * D * pairs, 14.0 * D * pairs),
        bytes=(2.0 * numbers, 2.0 * (3 * numbers + B * T * D * H)),
        **options,
    )


def decode(B: int, S: int, H: int = 16, G: int = 4, D: int = 128) -> Case:
    def make(B: int, S: int) -> Inputs:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        return {"q": normal(B, 1, H, D), "k": normal(B, S + 64, G, D)[:, :S], "v": normal(B, S + 64, G, D)[:, :S]}

    return Case(
        op="attention",
        shape=f"decode B{B} S{S} H{H} G{G} D{D}",
        inputs=partial(make, B, S),
        run=partial(attention, implementation="triton"),
        reference=attention_recurrent,
        small=partial(make, min(B, 2), 1111),
        peers=PEERS,
        flops=(4.0 * B * S * H * D, 0.0),
        bytes=(4.0 * B * S * G * D, 0.0),
        backward=False,
        graphed=True,
        against="floor",
        goal=2.0,
    )


CASES = [
    case(peers=PEERS, against=CUDNN, goal=1.4),
    case(forced=False, note=" dispatched", peers=PEERS, against=CUDNN, goal=1.0),
    case(G=4, peers=PEERS, against=CUDNN, goal=1.4),
    case(8, 2048, peers=PEERS, against=CUDNN, goal=1.4),
    case(8, 2048, forced=False, note=" dispatched", peers=PEERS, against=CUDNN, goal=1.0),
    case(D=64, peers=PEERS, against=CUDNN, goal=1.4),
    case(window=1024, peers={FLEX: partial(flex, window=1024)}, against=FLEX, goal=0.9),
    case(G=4, window=1024, peers={FLEX: partial(flex, window=1024)}, against=FLEX, goal=0.9),
    case(sink=True, note=" sink"),
    case(documents=8, note=" 8 documents"),
    case(G=4, window=128, sink=True, note=" sink"),
    case(16, 512, 4, 4, 64, forced=False, note=" proxy, dispatched", peers=PEERS),
    case(16, 512, 4, 4, 64, note=" proxy", peers=PEERS),
    *(decode(B, S) for B in (1, 64) for S in (8192, 32768)),
]
