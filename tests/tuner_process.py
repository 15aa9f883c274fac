"""A tuner's process on a made-up device: `python tuner_process.py record|time`, kernels interpreted on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import triton_interpreter  # noqa: F401  (mends it before anything imports triton)

from archsearch_kernels.launch import Config, Launch
from archsearch_kernels.tuner import ahead, lookup, search, worker
from archsearch_kernels.tuner.identity import Compiler, Device

CARD = Device("Card", "9.0", 132, 52428800, 232448, 80)


class Timer:
    """Blocks of 32 rows are the fastest; longer inputs take longer."""

    def times(self, launch: Launch, config: Config, n: int) -> list[float]:
        """Made up."""
        return [launch.arguments["T"] * (1 + abs(config["BM"] - 32) / 32)] * n

    def interleave(self, launch: Launch, candidates: Sequence[search.Candidate], n: int) -> None:
        """`n` more runs of each."""
        for candidate in candidates:
            candidate.runs_us += self.times(launch, candidate.config, n)


def make_up(set_attribute: Any = setattr) -> None:
    """A Hopper card, in place of whatever is there."""
    for module in (lookup, search, worker):
        set_attribute(module, "device", lambda: CARD)
        set_attribute(module, "compiler", lambda: Compiler("3.6.0", "12.9"))
    set_attribute(ahead, "device", lambda: CARD)
    set_attribute(search, "Timer", Timer)
    set_attribute(search, "capability", lambda: 90)
    set_attribute(search.torch.cuda, "synchronize", lambda *args: None)
    set_attribute(search.torch.cuda, "empty_cache", lambda: None)


if __name__ == "__main__":
    make_up()
    (ahead if sys.argv[1] == "record" else worker).main()
