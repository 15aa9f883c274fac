"""Every mixer against full attention at one shape: forward, and forward with backward. Runs on the CPU or a GPU.

python benchmarks/mixers.py [--context 4096] [--d-model 256] [--batch 1] [--threads 1] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from archsearch.contract import Site
from archsearch.mixers import MIXERS

OPTIONS = {
    "attention": {"head_dim": 64},
    "scalar_decay": {"variant": "simple_gla"},
    "moba": {"block_size": 64, "top_k": 4},
}
SKIPPED = ("none", "parallel")


def main() -> None:
    """Print median ms and the ratio to attention's, per mixer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    shape = f"B{given.batch} T{given.context} D{given.d_model}"
    print(f"torch {torch.__version__}, {given.device}, {given.threads} thread(s), {shape}, fp32")
    base: list[float] | None = None
    for kind in MIXERS.table:
        if kind in SKIPPED:
            continue
        spec = MIXERS.load(kind).model_validate({"kind": kind, **OPTIONS.get(kind, {})}).at_context(given.context)
        module = spec.call(Site(given.d_model, 0, 12)).build()
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        module = module.to(given.device)
        x = torch.randn(given.batch, given.context, given.d_model, device=given.device, requires_grad=True)
        forward, both = [], []
        for _ in range(given.repeats):
            with torch.no_grad():
                forward.append(timed(partial(module, x), given.device))
            both.append(timed(partial(there_and_back, module, x), given.device))
        ms = [statistics.median(forward), statistics.median(both)]
        base = base or ms
        shown = [f"{time_:8.1f} ms ({time_ / of:4.2f}x)" for time_, of in zip(ms, base, strict=True)]
        print(f"{kind:<16} forward {shown[0]}   with backward {shown[1]}")


def there_and_back(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    module(x).sum().backward()


def timed(work: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
