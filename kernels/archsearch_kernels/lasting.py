"""Tensors that live as long as the process, in no CUDA graph's memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def lasting(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """`make()` on this device, done before it is returned; not from within a capture.

    What a thread allocates while a graph is warmed up goes to the graph's pool (torch.compile's reduce-overhead does
    that), so another thread allocates, on another stream.
    """
    if device.type != "cuda":
        return make()

    def aside() -> Tensor:
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            made = make()
        stream.synchronize()
        return made

    with ThreadPoolExecutor(1) as other:
        return other.submit(aside).result()
