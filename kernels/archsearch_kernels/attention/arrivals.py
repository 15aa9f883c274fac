"""Counters through which the programs of one launch learn who is last; every launch leaves the zeros it found.

Two launches that may run at the same time must not share counters. Launches of one stream run in turn, so each stream
has its own. A captured launch may be replayed beside any stream, so it takes counters that nobody else ever gets.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from archsearch_kernels.lasting import lasting

LEAST = 4096  # counters of a stream
RESERVED = 1 << 18  # counters of a device for captured launches: a megabyte
ALIGNED = 4  # to 16 bytes: other addresses are another compilation

_lock = threading.Lock()
_of_streams: dict[tuple[str, int | None, int], Tensor] = {}
_outgrown: list[Tensor] = []
_reserves: dict[tuple[str, int | None], Tensor] = {}


def arrivals(n: int, device: torch.device) -> Tensor:
    """`n` int32 zeros for a launch on the device's current stream, which has to leave zeros."""
    if device.type != "cuda":
        return _of_stream(n, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _reserved(n, device)
    with _lock:
        if (device.type, device.index) not in _reserves:
            _reserves[device.type, device.index] = _zeros(RESERVED, device)
    return _of_stream(n, device, torch.cuda.current_stream(device).cuda_stream)


def _of_stream(n: int, device: torch.device, stream: int) -> Tensor:
    key = (device.type, device.index, stream)
    with _lock:
        found = _of_streams.get(key)
        if found is None or found.numel() < n:
            if found is not None:
                _outgrown.append(found)  # launches that are still to run count in it
            found = _of_streams[key] = _zeros(max(LEAST, n), device)
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


def _zeros(n: int, device: torch.device) -> Tensor:
    return lasting(device, lambda: torch.zeros(n, dtype=torch.int32, device=device))
