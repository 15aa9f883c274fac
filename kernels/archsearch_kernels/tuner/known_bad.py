"""Configurations that a compiler is known to get wrong. Data: a rule names where it holds and where that was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from archsearch_kernels.tuner.identity import Compiler, Device

Version = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """Kernels (a shell pattern) with these option values on this capability and Triton version are never run."""

    kernels: str
    options: Mapping[str, int]
    capability: str
    since: Version = ()
    before: Version = (999,)
    source: str = field(default="", compare=False)


RULES: tuple[Rule, ...] = (
    Rule(
        "kda_walk",
        {"num_warps": 8, "num_stages": 1},
        "9.0",
        since=(3, 4),
        before=(3, 7, 1),
        source="gradients of k, v, beta, g off by 10 to 90 % at K = V = 64, bf16; H100, triton 3.6.0 (docs/log.md)",
    ),
)


def is_known_bad(kernel: str, config: Mapping[str, int], device: Device, compiler: Compiler) -> bool:
    """Whether a rule excludes the configuration."""
    version = tuple(int(part) for part in compiler.triton.split("+")[0].split(".")[:3] if part.isdigit())
    return any(
        fnmatchcase(kernel, rule.kernels)
        and all(config.get(name) == value for name, value in rule.options.items())
        and rule.capability == device.capability
        and rule.since <= version < rule.before
        for rule in RULES
    )
