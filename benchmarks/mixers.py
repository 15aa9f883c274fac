"""Every mixer against full attention at one shape: forward, and forward with backward. Runs on the CPU or a GPU.

python benchmarks/mixers.py [--context 4096] [--d-model 256] [--batch 1] [--threads 1] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time

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
    print(
        f"torch {torch.__version__}, {given.device}, {given.threads} thread(s), B{given.batch} T{given.context} D{given.d_model}, fp32"
    )
    base: tuple[float, float] | None = None
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
                forward.append(timed(lambda: module(x), given.device))
            both.append(timed(lambda: module(x).sum().backward(), given.device))
        now = (statistics.median(forward), statistics.median(both))
        base = base or now
        print(
            f"{kind:<16} forward {now[0]:8.1f} ms ({now[0] / base[0]:4.2f}x)   with backward {now[1]:8.1f} ms ({now[1] / base[1]:4.2f}x)"
        )


def timed(work: object, device: str) -> float:
    """Milliseconds of one call."""
    assert callable(work)
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
