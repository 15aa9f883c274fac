"""Counters through which the programs of one launch learn who is last; every launch leaves the zeros it found.

Two launches that may run at the same time must not share counters. Launches of one stream run in turn, so each stream
has its own. A captured launch may be replayed beside any stream, so it takes counters that nobody else ever gets.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

LEAST = 4096  # counters of a stream
RESERVED = 1 << 18  # counters of a device for captured launches: a megabyte
ALIGNED = 4  # to 16 bytes: other addresses are another compilation

_lock = threading.Lock()
_of_streams: dict[tuple[str, int | None, int], Tensor] = {}
_reserves: dict[tuple[str, int | None], Tensor] = {}


def arrivals(n: int, device: torch.device) -> Tensor:
    """`n` int32 zeros for a launch on the device's current stream, which has to leave zeros."""
    if device.type != "cuda":
        return _of_stream(n, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _reserved(n, device)
    if (device.type, device.index) not in _reserves:
        _reserves[device.type, device.index] = _lasting(RESERVED, device)
    return _of_stream(n, device, torch.cuda.current_stream(device).cuda_stream)


def _of_stream(n: int, device: torch.device, stream: int) -> Tensor:
    key = (device.type, device.index, stream)
    found = _of_streams.get(key)
    if found is None or found.numel() < n:
        found = _of_streams[key] = _lasting(max(LEAST, n), device)
    return found


def _reserved(n: int, device: torch.device) -> Tensor:
    """From the reserve; where that is used up, or was never made, zeros that the graph sets anew at every replay."""
    taken = -(-n // ALIGNED) * ALIGNED
    with _lock:
        reserve = _reserves.get((device.type, device.index))
        if reserve is None or reserve.numel() < taken:
            return torch.zeros(n, dtype=torch.int32, device=device)
        _reserves[device.type, device.index] = reserve[taken:]
    return reserve[:n]


def _lasting(n: int, device: torch.device) -> Tensor:
    """Zeros for as long as the process lives, in no graph's memory.

    What a thread allocates while a graph is warmed up goes to the graph's pool (torch.compile's reduce-overhead does
    that), so another thread allocates, on another stream.
    """

    def make() -> Tensor:
        if device.type != "cuda":
            return torch.zeros(n, dtype=torch.int32, device=device)
        aside: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(aside):
            zeros = torch.zeros(n, dtype=torch.int32, device=device)
        aside.synchronize()
        return zeros

    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()
