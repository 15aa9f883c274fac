"""`archsearch check`: what a space holds, before a single token is trained. Imports no torch.

Counts architectures, draws the smallest and the largest, samples some that break no rule, says what the rules refuse
and what a trial trains on; doubts.py says what is odd about it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from archsearch import cost
from archsearch.architecture import Architecture, Block, ModelSpec
from archsearch.choosers import RandomChooser, Uncountable, enumerate_space
from archsearch.doubts import doubts
from archsearch.draw import one_line
from archsearch.errors import DataError, SpaceError
from archsearch.graph import misfits
from archsearch.notation import in_bytes, si
from archsearch.objectives import beyond_limit
from archsearch.recipes import baselines
from archsearch.settings import Train
from archsearch.space import Candidate, SearchSpace
from archsearch.space.search_space import Refusal

COUNT_SECONDS = 0.7
SAMPLE_SECONDS = 0.6
MAX_SAMPLES = 400
ENOUGH = 5  # candidates with a mixer or FFN, none of which it fits, until it counts as a mistake
N_SHOWN = 3

Entry = tuple[str, str]  # `mixers` or `ffns`, and a name


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
    nearest: dict[str, tuple[float, str]] = field(default_factory=dict)  # by rule: the least violation, and its words
    warnings: list[str] = field(default_factory=list)
    smallest: Architecture | None = None
    largest: Architecture | None = None
    examples: list[Architecture] = field(default_factory=list)
    training: list[tuple[Train, int]] = field(default_factory=list)  # each with the proxy's context
    held_out: int | None = None  # tokens of the corpus, where they are cheaply known
    used: Counter[Entry] = field(default_factory=Counter)  # candidates that a mixer or FFN stands in
    unfit: Counter[Entry] = field(default_factory=Counter)  # those in which it does not fit, and what is wrong in most
    misfits: dict[Entry, Counter[str]] = field(default_factory=dict)

    @property
    def is_one(self) -> bool:
        """Nothing is left to choose."""
        return self.counted and self.distinct == 1

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
            "training": [_training_numbers(train, context) for train, context in self.training],
            "held_out_tokens": self.held_out,
            **{name: _numbers(found) for name, found in shown.items() if found is not None},
            "examples": [_numbers(found) for found in self.examples],
        }

    def text(self) -> str:
        """For people."""
        lines = [f"{self.name}: valid"]
        if self.is_one:
            lines.append("  architectures  1, and it passes")
        elif self.counted:
            lines.append(f"  architectures  {self.distinct:,} distinct, counted one by one")
        elif self.combinations == float("inf"):
            lines.append("  architectures  without number (a hole is continuous)")
        else:
            lines.append(f"  architectures  about {si(self.combinations)} combinations, estimated (Knuth 1975)")
        if not self.is_one:
            share = self.n_passed / max(1, self.n_samples)
            lines.append(f"  rules          {self.n_passed} of {self.n_samples} random candidates pass ({share:.0%})")
            for rule, count in self.refused_by.most_common(6):
                lines.append(f"                 {count / self.n_samples:>4.0%} fail: {rule}")
        lines.append(f"  training       {self._training()}")
        if self.smallest is not None and self.largest is not None:
            bounds = [found.at("target") for found in (self.smallest, self.largest)]
            weights = _span((cost.weight_bytes(model) for model in bounds), in_bytes)
            lines.append(f"  memory         {weights} of weights at target scale ({bounds[-1].dtype})")
        lines += [f"  warning        {warning}" for warning in self.warnings]
        titled = [("smallest that passes", self.smallest), ("largest that passes", self.largest)]
        for title, found in [("the architecture", self.smallest)] if self.is_one else titled:
            if found is not None:
                lines += ["", f"  {title}{'' if self.is_one else ', by parameters at target scale'}", *_drawn(found)]
        if self.examples and not self.is_one:
            lines += ["", "  some that pass (proxy)"]
            lines += [f"    {found.arch_id}  {one_line(found.at('proxy'))}" for found in self.examples]
        return "\n".join(lines)

    def _training(self) -> str:
        numbers = [_training_numbers(train, context) for train, context in self.training]
        tokens, steps, step, val = (
            _span((each[key] for each in numbers), write)
            for key, write in (("tokens", si), ("steps", _whole), ("tokens_per_step", _whole), ("val_tokens", si))
        )
        judged = f"{val} held-out tokens"
        if self.held_out is not None and self.held_out < max(each["val_tokens"] for each in numbers):
            judged = f"all {si(self.held_out)} held-out tokens that the corpus has (val_tokens: {val})"
        return f"{tokens} tokens a trial in {steps} steps of {step}, judged on {judged}"


def check_space(space: SearchSpace, seed: int = 0) -> Check:
    """Look a space over; raises SpaceError if its corpus is not there, a baseline is unknown or unfit, or no candidate
    passes its rules.
    """
    held_out = _check_corpus(space)
    named = baselines(space)
    found = Check(space.name, held_out=held_out)
    began = time.perf_counter()
    passing = _sample(space, found, seed)
    if found.combinations * (time.perf_counter() - began) / found.n_samples < 1.5 * COUNT_SECONDS:
        passing += _count(space, found)
    if not passing:
        raise SpaceError(_why_none_passes(space, found))
    passing.sort(key=lambda candidate: cost.params(candidate.architecture.at("target")))
    found.smallest, found.largest = passing[0].architecture, passing[-1].architecture
    ids = {c.architecture.arch_id: c.architecture for c in passing}
    found.examples = list(ids.values())[:: max(1, len(ids) // N_SHOWN)][:N_SHOWN]
    plans = {repr(plan): plan for c in passing for plan in [(c.train, c.architecture.at("proxy").context)]}
    found.training = list(plans.values())
    found.warnings += _never_fitting(space, found)
    found.warnings += doubts(space, passing, named, found.training)
    return found


def _check_corpus(space: SearchSpace) -> int | None:
    """The held-out tokens, where they are cheaply known. Raises SpaceError if the corpus cannot be used."""
    from archsearch.data import held_out_tokens

    try:
        return held_out_tokens(space.task, space.base_dir)
    except DataError as error:
        where = space.source.where(("task", "corpus"))
        raise SpaceError(f"{where}: task.corpus cannot be used: {error}") from None


def _never_fitting(space: SearchSpace, found: Check) -> list[str]:
    """Mixers and FFNs that fit in none of the candidates which use them: only what goes without them is searched."""
    return [
        f"{section}.{name} ({space.source.where((section, name))}) fits in none of the {n} candidates looked at that "
        f"use it, and they are never trained: {found.misfits[section, name].most_common(1)[0][0]}"
        for (section, name), n in found.used.items()
        if ENOUGH <= n == found.unfit[section, name]
    ]


def _why_none_passes(space: SearchSpace, found: Check) -> list[str]:
    """What has a line of its own in the file is a problem of that line; rules share one sentence."""
    mistakes = sorted(why for why in found.refused_by if why.startswith(f"{space.source.name}:"))
    told = [f"{why} ({found.refused_by[why]} of {found.n_samples} candidates)" for why in mistakes]
    others = [(why, n) for why, n in found.refused_by.most_common() if why not in mistakes]
    if others:
        texts = [rule.text for rule in space.rules]
        first = others[0][0]
        where = space.source.where(("rules", texts.index(first))) if first in texts else space.source.name
        rules = [f"{n} of {found.n_samples}: {found.nearest.get(why, (0, why))[1]}" for why, n in others]
        what = "rules" if all(why in texts for why, _ in others) else "rules and limits"
        told.append(f"{where}: no candidate passes the {what} ({'; '.join(rules[:3])})")
    return told


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
                if space.refusal(candidate) is None and beyond_limit(space.objectives, candidate.architecture) is None:
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
        refusal = space.refusal(candidate)
        _note_fit(candidate.architecture, found, refusal)
        over = None if refusal is not None else beyond_limit(space.objectives, candidate.architecture)
        if over is not None:
            found.refused_by[over.limit] += 1
            found.nearest[over.limit] = min(found.nearest.get(over.limit, (over.by, over.why)), (over.by, over.why))
        elif refusal is None:
            passing.append(candidate)
        elif refusal.reason == "rule":
            broken = {text: violation for text, violation in refusal.violations.items() if violation > 0}
            found.refused_by.update(broken.keys())
            for (text, violation), why in zip(broken.items(), refusal.details, strict=True):
                found.nearest[text] = min(found.nearest.get(text, (violation, why)), (violation, why))
        else:
            found.refused_by.update(refusal.details)
        if chooser.branching == 1:
            break  # nothing to choose: all samples are the same
    found.n_passed = len(passing)
    found.combinations = leaves / found.n_samples
    return passing


def _note_fit(architecture: Architecture, found: Check, refusal: Refusal | None) -> None:
    """Count where mixers and FFNs stand, and where they do not fit a width."""
    models = architecture.scales.values()
    found.used.update({entry for model in models for block in model.blocks for entry in _entries(block)})
    if refusal is None or refusal.reason != "graph":
        return
    unfit: dict[Entry, str] = {}
    for scale in ("target", "proxy"):
        unfit |= {entry: f"at {scale} scale, {why}" for entry, why in misfits(architecture.at(scale)).items()}
    found.unfit.update(unfit.keys())
    for entry, why in unfit.items():
        found.misfits.setdefault(entry, Counter())[why] += 1


def _entries(block: Block) -> tuple[Entry, Entry]:
    return ("mixers", block.mixer_name or block.mixer.kind), ("ffns", block.ffn_name or block.ffn.kind)


def _training_numbers(train: Train, context: int) -> dict[str, int]:
    step = train.step_tokens(context)
    return {
        "tokens": train.tokens,
        "steps": -(-train.tokens // step),
        "tokens_per_step": step,
        "val_tokens": train.val_tokens,
    }


def _span(values: Iterable[int], write: Callable[[float], str]) -> str:
    """`4`, or `4 to 16` where they differ."""
    found = list(values)
    return " to ".join(dict.fromkeys(write(bound) for bound in (min(found), max(found))))


def _whole(value: float) -> str:
    return f"{value:,.0f}"


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
            "weight_bytes": cost.weight_bytes(model),
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
