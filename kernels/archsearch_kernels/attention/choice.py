"""Which kernel runs plain causal attention: ours or torch's, by what was measured on the GPU at hand.

Windows, sinks and packed documents always run our Triton kernels: torch's fused backends know none of them.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from archsearch_kernels.dispatch import constant_when_traced

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# GPU: (head width, with gradient): from how many tokens torch is faster. H100, bf16, forward and backward, cuDNN 9 and
# ours, ms: D64 T512 0.070, 0.052; D64 T8192 2.44, 2.81; D128 T2048 1.15, 1.47; D128 T8192 3.85, 4.97. H200: the same
# to 2 %.
MEASURED = {(64, False): 1024, (64, True): 1024, (128, False): 512, (128, True): 512}
SDPA_FROM: dict[str, dict[tuple[int, bool], int]] = {"NVIDIA H100": MEASURED, "NVIDIA H200": MEASURED}
UNMEASURED = MEASURED  # other GPUs


def choice(
    gpu: str, T: int, D: int, group: int, window: int | None, dtype: torch.dtype, gradient: bool, plain: bool = True
) -> str:
    """'sdpa' or 'triton' for T queries over T keys of width D, `group` query heads a key head.

    plain: neither sink nor documents, values as wide as keys, no log-sum-exp asked for.
    """
    if not plain or window is not None or dtype not in (torch.float16, torch.bfloat16):
        return "triton"
    rows = next((rows for name, rows in SDPA_FROM.items() if gpu.startswith(name)), UNMEASURED)
    least = rows.get((D, gradient))
    return "sdpa" if least is not None and least <= T else "triton"


@constant_when_traced
def gpu_name(device: torch.device) -> str:
    """What the table calls the GPU."""
    return _gpu_name(device)


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by torch's best fused backend; nothing is copied."""
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2)
