"""Whether exported code computes with kernels what it computes without; asked at export where kernels can run.

There is no one number that kernels may differ by: what counts is how far plain torch in the model's dtype is from
plain torch in a wider one. Kernels round in other places and may be ALLOWED times as far, at least the dtype's FLOOR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from archsearch.errors import ExportError

ALLOWED = 3.0
FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative, root mean square
Run = Callable[[Any, Tensor], Tensor]


@contextmanager
def plain_torch(module: ModuleType) -> Iterator[None]:
    """Inside, operations of the exported module do not ask for kernels."""
    before = vars(module).get("use_kernels")
    if before is None:
        yield
        return
    vars(module)["use_kernels"] = lambda x: False
    try:
        yield
    finally:
        vars(module)["use_kernels"] = before


@torch.no_grad()
def compare_kernels(module: ModuleType, make: Callable[[], Any], run: Run, tokens: Tensor, dtype: torch.dtype) -> str:
    """What a card says of kernels: how far the logits of `tokens` [1, T] are off; empty without kernels.

    make: the exported model on the CPU in float32, anew. run: its logits of tokens, in whatever ways are to be
    compared. Raises ExportError if kernels are farther off than their dtype warrants.
    """
    kernels = vars(module).get("kernels")
    if kernels is None:
        return ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = tokens.to(device)
    if not kernels.kernels_run(tokens):
        return "Kernels were not compared: they do not run on the machine of the export."
    with plain_torch(module):
        wider = torch.float64 if dtype == torch.float32 else torch.float32
        exact = run(make().to(device, wider), tokens)
        model = make().to(device, dtype)
        torch_error = _error(run(model, tokens), exact)
    error, allowed = _error(run(model, tokens), exact), max(ALLOWED * torch_error, FLOOR[dtype])
    name, where = str(dtype).partition(".")[2], torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    told = f"{error:.1e} off in {name}, torch alone {torch_error:.1e}, at most {allowed:.1e} being allowed"
    if not error <= allowed:
        raise ExportError(f"with Triton kernels the logits are {told}, on {where}; --kernels none leaves them out")
    return f"With Triton kernels on {where} its logits are {told} (root mean square, relative, against a wider dtype)."


def _error(found: Tensor, exact: Tensor) -> float:
    apart = (found.double() - exact.double()).square().mean().sqrt()
    return float((apart / exact.double().square().mean().sqrt()).nan_to_num(float("inf")))
