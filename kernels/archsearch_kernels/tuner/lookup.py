"""The best known configuration of a launch."""

from __future__ import annotations

from collections.abc import Sequence

from archsearch_kernels.launch import Config, Kernel, Key


def best(kernel: Kernel, key: Key, candidates: Sequence[Config]) -> Config | None:
    """None: nothing is known."""
    return None
