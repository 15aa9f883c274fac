"""Tensors that live as long as the process, in no CUDA graph's memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_kept: dict[tuple[str, int | None, Hashable], Tensor] = {}


def kept(device: torch.device, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, once for a device and key. A capture uses what is there already; what is not is made in its graph.

    What torch.compile traces is made in its code.
    """
    if torch.compiler.is_compiling():
        return make()
    found = _kept.get((device.type, device.index, key))
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return make()
        found = _kept[device.type, device.index, key] = lasting(device, make)
    return found


def lasting(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """`make()` on this device, done before it is returned; not from within a capture.

    What a thread allocates while a graph is warmed up goes to the graph's pool (torch.compile's reduce-overhead does
    that), so another thread allocates, on another stream. Nor is that thread in inference mode, or any other.
    """

    def aside() -> Tensor:
        if device.type != "cuda":
            return make()
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            made = make()
        stream.synchronize()
        return made

    with ThreadPoolExecutor(1) as other:
        return other.submit(aside).result()
