"""What `archsearch check` warns of: a space that is valid and perhaps not what was meant.

Numbers that contradict each other, sharing that joins nothing, what a short or shallow proxy never trains, and what
this machine cannot measure. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from archsearch import cost, machine
from archsearch.architecture import Architecture, ModelSpec
from archsearch.notation import in_bytes
from archsearch.objectives import beyond_limit, direction, objective, scale_of
from archsearch.settings import Train
from archsearch.space import Candidate, SearchSpace
from archsearch.space.holes import hole_name
from archsearch.space.yaml_source import Path_

SMALL = 2**30  # bytes of weights that any machine holds


def doubts(
    space: SearchSpace,
    candidates: Sequence[Candidate],
    baselines: Sequence[Candidate],
    plans: Iterable[tuple[Train, int]],
) -> list[str]:
    """A sentence each. `candidates` pass the rules, from the smallest to the largest at the target, at least one;
    `plans` are their ways of training, each with the proxy's context.
    """
    first = candidates[0].architecture
    return [
        *_odd_scales(first),
        *_odd_goals(space),
        *_odd_lists(space, first.at("proxy").n_blocks),
        *_unused(space),
        *_refused_baselines(space, baselines),
        *_shares_nothing(space, candidates),
        *_never_trained([*baselines, *candidates]),
        *_short_proxy(candidates),
        *_odd_numbers(plans),
        *_beyond_this_machine(space, candidates),
    ]


def _odd_scales(architecture: Architecture) -> list[str]:
    """A target that is smaller than the proxy: as a rule the two are swapped."""
    proxy, target = architecture.at("proxy"), architecture.at("target")
    if target.n_blocks * target.d_model**2 >= proxy.n_blocks * proxy.d_model**2:
        return []
    sizes = [f"{model.n_blocks} blocks of width {model.d_model}" for model in (target, proxy)]
    return [f"scales.target ({sizes[0]}) is smaller than scales.proxy ({sizes[1]}): are they swapped?"]


def _odd_goals(space: SearchSpace) -> list[str]:
    """Objectives that are sought in the direction in which they get worse."""
    return [
        f"objectives: {goal.name} is to be {'large' if direction(goal) == 'max' else 'small'} (goal: {direction(goal)})"
        f", and it is the better the {'smaller' if direction(goal) == 'max' else 'larger'}"
        for goal in space.objectives
        if direction(goal) != objective(goal).goal
    ]


def _odd_lists(space: SearchSpace, n_blocks: int) -> list[str]:
    """Lists of blocks that are no list of the proxy's blocks."""
    warnings: dict[str, None] = {}
    for path, node in _layouts(space.tree["layout"], ("layout",)):
        listed = node.get("blocks")
        if isinstance(listed, list) and len(listed) != n_blocks and "stages" not in path:
            what = f"{hole_name(path)}.blocks lists {len(listed)} blocks and the proxy has {n_blocks}"
            warnings[f"{what}: the list is brought to that length by `grow` before it is trained"] = None
    return list(warnings)


def _unused(space: SearchSpace) -> list[str]:
    """Mixers and FFNs that no layout names."""
    warnings = []
    for what in ("mixer", "ffn"):
        section = space.tree[f"{what}s"]
        named = set(_words(space.tree["layout"].get(what)))
        for name in [name for name in section if name in named]:  # a parallel mixer names others
            named.update(_words(section[name]))
        warnings += [
            f"{what}s.{name} stands in no layout.{what}, and is never used" for name in section if name not in named
        ]
    return warnings


def _words(node: Any) -> Iterator[str]:
    """Every text below a node, keys too."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from (str(key) for key in node)
        for inner in node.values():
            yield from _words(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _words(inner)


def _refused_baselines(space: SearchSpace, baselines: Sequence[Candidate]) -> list[str]:
    """Baselines that are beyond a limit that their layout alone decides."""
    warnings = []
    for candidate in baselines:
        over = beyond_limit(space.objectives, candidate.architecture)
        if over is not None:
            seeds = f", and its {space.search.seeds} seeds measure no noise" if candidate is baselines[0] else ""
            warnings.append(f"baseline {candidate.name}: {over.why}: it is refused" + seeds * (space.search.seeds > 1))
    return warnings


def _layouts(node: Any, path: Path_) -> Iterator[tuple[Path_, dict[str, Any]]]:
    """Every mapping below a node, with its path."""
    if isinstance(node, dict):
        yield path, node
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _layouts(inner, (*path, key))


def _shares_nothing(space: SearchSpace, candidates: Sequence[Candidate]) -> list[str]:
    """Sharing that is asked for and that no block of any candidate can do."""
    wanted = space.tree.get("share", {})
    blocks = [block for c in candidates for model in c.architecture.scales.values() for block in model.blocks]
    joined = {
        "kv": any(block.kv_from is not None for block in blocks),
        "weights": any(b.mixer_weights_from is not None or b.ffn_weights_from is not None for b in blocks),
    }
    why = {
        "kv": "it is for blocks of one attention mixer that stands by itself, in no parallel",
        "weights": "no two blocks have what it names",
    }
    return [
        f"share.{what} joins no blocks in any candidate looked at: {why[what]}"
        for what in joined
        if wanted.get(what, "none") != "none" and not joined[what]
    ]


def _never_trained(candidates: Sequence[Candidate]) -> list[str]:
    """Mixers and FFNs that stand at the target only: timed, and never trained."""
    found: dict[str, Counter[str]] = {}
    for candidate in candidates:
        proxy, target = (_names(candidate.architecture.at(scale)) for scale in ("proxy", "target"))
        for name in target - proxy:
            found.setdefault(name, Counter())[f"baseline {candidate.name}" if candidate.name else ""] += 1
    warnings = []
    for name, whose in found.items():
        n, total = whose.pop("", 0), sum(candidate.name is None for candidate in candidates)
        parts = [*whose, *([f"{n} of {total} candidates looked at" if total > 1 else "the architecture"] if n else [])]
        warnings.append(
            f"{name} stands at the target and not at the proxy of {', '.join(parts)}: it is timed and never trained; "
            "give the proxy more blocks"
            + (f", or write the rule count({name.partition('.')[2]}, proxy) >= 1" if 0 < n < total else "")
        )
    return warnings


def _names(model: ModelSpec) -> set[str]:
    """`mixers.gdn`, `ffns.dense`: what stands in a model."""
    return {name for b in model.blocks for name in (f"mixers.{b.mixer_name}", f"ffns.{b.ffn_name}")}


def _short_proxy(candidates: Sequence[Candidate]) -> list[str]:
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


def _odd_numbers(plans: Iterable[tuple[Train, int]]) -> list[str]:
    """Where tokens, batch and context do not go together, and what happens then."""
    warnings: dict[str, None] = {}
    for train, context in plans:
        step, row = train.step_tokens(context), f"the proxy's context of {context:,}"
        batch = f"train.batch_tokens is {train.batch_tokens:,}"
        if train.batch_tokens < context:
            warnings[f"{batch}, below {row}: a step takes one row, {step:,} tokens"] = None
        elif train.batch_tokens != step:
            warnings[f"{batch}, no multiple of {row}: a step takes whole rows, {step:,} tokens"] = None
        if train.tokens < step:
            warnings[f"train.tokens is {train.tokens:,}, less than one step: {step:,} tokens are trained on"] = None
        if train.val_tokens < context:
            warnings[f"train.val_tokens is {train.val_tokens:,}, below {row}: one row is judged"] = None
    return list(warnings)


def _beyond_this_machine(space: SearchSpace, candidates: Sequence[Candidate]) -> list[str]:
    """What the objectives ask to be measured here and cannot be, or only slowly. A cluster has machines of its own."""
    if space.runtime.runner == "ray":
        return []
    measured: dict[str, list[str]] = {}
    for goal in space.objectives:
        if objective(goal).stage == "bench" and goal.at.device is None:
            measured.setdefault(scale_of(goal), []).append(goal.name)
    on_gpu = machine.has_gpu() and space.runtime.device != "cpu"
    warnings = []
    for scale, names in measured.items():
        what, model = " and ".join(dict.fromkeys(names)), candidates[-1].architecture.at(scale)
        least, most = (cost.weight_bytes(each.architecture.at(scale)) for each in (candidates[0], candidates[-1]))
        room = machine.memory(on_gpu) if most > SMALL else None
        if room is not None and most > room:
            whose = "the weights" if least > room else "the weights of the largest that passes"
            have = f"{'the GPU' if on_gpu else 'this machine'} has {in_bytes(room)} of memory"
            warnings.append(f"{whose} take {in_bytes(most)} at {scale} scale, {have}: {what} cannot be measured here")
        elif not on_gpu and model.dtype != "float32":
            slow = f"what is measured at {scale} scale ({what}) is {model.dtype}, which CPUs are slow in"
            warnings.append(f"{slow}, and no GPU is used here; for this CPU write scales.{scale}.dtype: float32")
    return warnings
