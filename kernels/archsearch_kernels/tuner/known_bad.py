"""Configurations that an assembler is known to get wrong. Data: a rule names where it holds and where that was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from archsearch_kernels.tuner.identity import Compiler, Device

Version = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """Kernels (a shell pattern) with these option values are never run where ptxas, from version `since` on and before
    `before`, assembles for this capability."""

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
        before=(12, 9),
        source="gradients of k, v, beta, g off by 10 to 90 % at K = V = 64, bf16: a wgmma descriptor is lost; H100,"
        " triton 3.6.0, ptxas 12.8.93 (docs/log.md)",
    ),
)


def is_known_bad(kernel: str, config: Mapping[str, int], device: Device, compiler: Compiler) -> bool:
    """Whether a rule excludes the configuration. An unknown version counts as older than all."""
    version = tuple(int(part) for part in compiler.ptxas.split(".") if part.isdigit())
    return any(
        fnmatchcase(kernel, rule.kernels)
        and all(config.get(name) == value for name, value in rule.options.items())
        and rule.capability == device.capability
        and rule.since <= version < rule.before
        for rule in RULES
    )
