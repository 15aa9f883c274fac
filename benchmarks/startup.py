"""How long the command line takes to start, and a candidate to sample, validate and cost. No torch is involved.

python benchmarks/startup.py [space.yaml]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from archsearch import cost
from archsearch.choosers import RandomChooser
from archsearch.space import SearchSpace

REPEATS = 10
SAMPLES = 300


def seconds(command: list[str]) -> list[float]:
    """Wall seconds of a command, several times."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    """Print medians with p10 and p90."""
    path = sys.argv[1] if len(sys.argv) > 1 else "search_spaces/quickstart.yaml"
    python = sys.executable
    loading = f"from archsearch.space import SearchSpace; SearchSpace.load({path!r})"
    for name, command in (
        ("python -c pass", [python, "-c", "pass"]),
        ("archsearch --help", [python, "-m", "archsearch", "--help"]),
        ("load and validate the space", [python, "-c", loading]),
        ("archsearch check", [python, "-m", "archsearch", "check", path]),
    ):
        show(name, [1e3 * taken for taken in seconds(command)])
    space = SearchSpace.load(Path(path))
    each = []
    for seed in range(SAMPLES):
        began = time.perf_counter()
        candidate = space.sample(RandomChooser(seed))
        space.refusal(candidate)
        assert candidate.architecture.arch_id
        for model in candidate.architecture.scales.values():
            cost.params(model)
            cost.state_bytes(model)
            cost.flops(model)
        each.append(1e3 * (time.perf_counter() - began))
    blocks = sum(model.n_blocks for model in candidate.architecture.scales.values())
    show(f"sample + validate + cost, {blocks} blocks", each)


def show(name: str, ms: list[float]) -> None:
    """One line: median (p10 to p90) in ms."""
    low, *_, high = statistics.quantiles(ms, n=10)
    print(f"{name:<42} {statistics.median(ms):8.1f} ms  ({low:.1f} to {high:.1f}, n={len(ms)})")


if __name__ == "__main__":
    main()
