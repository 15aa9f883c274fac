"""`archsearch check`: what a space holds, before a single token is trained. Imports no torch.

Counts architectures, draws the smallest and the largest, samples some that break no rule, says what the rules refuse
and warns where a short proxy would hide what a mixer does.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from archsearch import cost
from archsearch.architecture import Architecture, ModelSpec
from archsearch.choosers import RandomChooser, Uncountable, enumerate_space
from archsearch.draw import one_line
from archsearch.errors import SpaceError
from archsearch.notation import in_bytes, si
from archsearch.space import Candidate, SearchSpace

COUNT_SECONDS = 0.7
SAMPLE_SECONDS = 0.6
MAX_SAMPLES = 400
N_SHOWN = 3


@dataclass
class Check:
    """The findings; `distinct` is exact when `counted` is, else the number of combinations is estimated."""

    name: str
    counted: bool = False
    distinct: int = 0
    combinations: float = 0.0
    n_samples: int = 0
    n_passed: int = 0
    refused_by: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    smallest: Architecture | None = None
    largest: Architecture | None = None
    examples: list[Architecture] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        shown = {"smallest": self.smallest, "largest": self.largest}
        return {
            "name": self.name,
            "distinct_architectures": self.distinct if self.counted else None,
            "combinations": self.combinations if self.combinations != float("inf") else None,
            "exact": self.counted,
            "samples": self.n_samples,
            "passed": self.n_passed,
            "refused_by": dict(self.refused_by),
            "warnings": self.warnings,
            **{name: _numbers(found) for name, found in shown.items() if found is not None},
            "examples": [_numbers(found) for found in self.examples],
        }

    def text(self) -> str:
        """For people."""
        lines = [f"{self.name}: valid"]
        if self.counted:
            lines.append(f"  architectures  {self.distinct:,} distinct, counted one by one")
        elif self.combinations == float("inf"):
            lines.append("  architectures  without number (a hole is continuous)")
        else:
            lines.append(f"  architectures  about {si(self.combinations)} combinations, estimated (Knuth 1975)")
        share = self.n_passed / max(1, self.n_samples)
        lines.append(f"  rules          {self.n_passed} of {self.n_samples} random candidates pass ({share:.0%})")
        for rule, count in self.refused_by.most_common(6):
            lines.append(f"                 {count / self.n_samples:>4.0%} fail: {rule}")
        lines += [f"  warning        {warning}" for warning in self.warnings]
        for title, found in (("smallest", self.smallest), ("largest", self.largest)):
            if found is not None:
                lines += ["", f"  {title} that passes, by parameters at target scale", *_drawn(found)]
        if self.examples:
            lines += ["", "  some that pass (proxy)"]
            lines += [f"    {found.arch_id}  {one_line(found.at('proxy'))}" for found in self.examples]
        return "\n".join(lines)


def check_space(space: SearchSpace, seed: int = 0) -> Check:
    """Look a space over; raises SpaceError if no candidate passes its rules."""
    found = Check(space.name)
    began = time.perf_counter()
    passing = _sample(space, found, seed)
    if found.combinations * (time.perf_counter() - began) / found.n_samples < 1.5 * COUNT_SECONDS:
        passing += _count(space, found)
    if not passing:
        why = "; ".join(f"{count} of {found.n_samples}: {text}" for text, count in found.refused_by.most_common(3))
        raise SpaceError(f"{space.source.name}: no candidate passes the rules ({why})")
    passing.sort(key=lambda candidate: cost.params(candidate.architecture.at("target")))
    found.smallest, found.largest = passing[0].architecture, passing[-1].architecture
    ids = {c.architecture.arch_id: c.architecture for c in passing}
    found.examples = list(ids.values())[:: max(1, len(ids) // N_SHOWN)][:N_SHOWN]
    found.warnings += _short_proxy(passing)
    return found


def _count(space: SearchSpace, found: Check) -> list[Candidate]:
    """Enumerate while time lasts; what passes comes back only if the whole space was walked."""
    ids: set[str] = set()
    passing: dict[str, Candidate] = {}
    combinations = 0
    until = time.perf_counter() + COUNT_SECONDS
    try:
        for candidate in enumerate_space(space):
            combinations += 1
            if candidate is not None and candidate.architecture.arch_id not in ids:
                ids.add(candidate.architecture.arch_id)
                if space.refusal(candidate) is None:
                    passing[candidate.architecture.arch_id] = candidate
            if time.perf_counter() > until:
                return []
    except Uncountable:
        return []
    found.counted, found.distinct, found.combinations = True, len(ids), combinations
    return list(passing.values())


def _sample(space: SearchSpace, found: Check, seed: int) -> list[Candidate]:
    passing, leaves = [], 0.0
    until = time.perf_counter() + SAMPLE_SECONDS
    while found.n_samples < MAX_SAMPLES and (found.n_samples < 20 or time.perf_counter() < until):
        chooser = RandomChooser(seed + found.n_samples)
        found.n_samples += 1
        try:
            candidate = space.sample(chooser)
        except SpaceError as error:
            found.refused_by[error.problems[0]] += 1
            continue
        leaves += chooser.branching
        if chooser.branching == 1 and found.n_samples > 1:
            break  # no holes: all samples are the same
        refusal = space.refusal(candidate)
        if refusal is None:
            passing.append(candidate)
        elif refusal.reason == "rule":
            found.refused_by.update(text for text, violation in refusal.violations.items() if violation > 0)
        else:
            found.refused_by[refusal.message.split(";")[0]] += 1
    found.n_passed = len(passing)
    found.combinations = leaves / found.n_samples
    return passing


def _short_proxy(candidates: list[Candidate]) -> list[str]:
    """Windows and budgets that a proxy's context does not exceed: such a mixer is full attention there."""
    warnings: dict[str, None] = {}
    for candidate in candidates:
        model = candidate.architecture.at("proxy")
        for block in model.blocks:
            for name in block.mixer.spans:
                span = getattr(block.mixer, name)
                if isinstance(span, int) and span >= model.context:
                    what = f"mixers.{block.mixer_name}.{name} is {span} at the proxy's context of {model.context}"
                    warnings[f"{what}: that is full attention; write at most '1/4 context'"] = None
    return list(warnings)


def _numbers(architecture: Architecture) -> dict[str, Any]:
    out: dict[str, Any] = {"arch_id": architecture.arch_id}
    for scale, model in architecture.scales.items():
        out[scale] = {
            "layout": one_line(model),
            "n_blocks": model.n_blocks,
            "d_model": model.d_model,
            "params": cost.params(model),
            "active_params": cost.active_params(model),
            "flops_per_token": cost.flops_per_token(model),
            "state_bytes": cost.state_bytes(model),
        }
    return out


def _drawn(architecture: Architecture) -> list[str]:
    return [line for scale, model in architecture.scales.items() for line in _drawn_model(scale, model)]


def _drawn_model(scale: str, model: ModelSpec) -> list[str]:
    params, active = cost.params(model), cost.active_params(model)
    used = f" ({si(active)} active)" if active != params else ""
    return [
        f"    {scale:<7} {model.n_blocks} blocks of width {model.d_model}, {si(params)} parameters{used}, "
        f"{si(cost.flops_per_token(model))} FLOPs/token, {in_bytes(cost.state_bytes(model))} of state at "
        f"{model.context:,} tokens",
        f"            {one_line(model)}",
    ]
