"""ModelSpec to nx.DiGraph: blocks, the residual stream, and the key/value and weight edges across depth.

Whatever could not be a model is refused here, all problems at once, before any tensor exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archsearch.architecture import ModelSpec
from archsearch.errors import GraphError

if TYPE_CHECKING:
    import networkx as nx

CAUSAL_TASKS = ("causal_lm",)


def misfits(model: ModelSpec) -> dict[tuple[str, str], str]:
    """Mixers and FFNs whose options do not go together at this width, by alphabet (`mixers`, `ffns`) and name."""
    return {entry: why for _, entry, why in reversed(_misfits(model))}


def _misfits(model: ModelSpec) -> list[tuple[int, tuple[str, str], str]]:
    """(first block, (alphabet, name), why): said once of blocks that are the same."""
    found: dict[tuple[tuple[str, str], str], int] = {}
    for i, block in enumerate(model.blocks):
        name, ffn_name = block.mixer_name or block.mixer.kind, block.ffn_name or block.ffn.kind
        for spec, entry in ((block.mixer, ("mixers", name)), (block.ffn, ("ffns", ffn_name))):
            try:
                spec.check(model.site(i))
            except ValueError as error:
                found.setdefault((entry, str(error)), i)
    return [(i, entry, why) for (entry, why), i in found.items()]


def problems(model: ModelSpec) -> list[str]:
    """What keeps this from being a model, one line each; empty if nothing does."""
    found: list[str] = []
    unfit = _misfits(model)
    for i in range(model.n_blocks):
        found += [f"block {i} ({entry}): {why}" for first, (_, entry), why in unfit if first == i]
        found += _problems_of(model, i)
    return found


def problems_of_layout(model: ModelSpec) -> list[str]:
    """Those of `problems` that remain where there are no `misfits`."""
    return [problem for i in range(model.n_blocks) for problem in _problems_of(model, i)]


def _problems_of(model: ModelSpec, i: int) -> list[str]:
    block, found = model.blocks[i], []
    if block.mixer.kind == "none" and block.ffn.kind == "none":
        found.append(f"block {i} has neither a mixer nor an ffn")
    if model.task in CAUSAL_TASKS and not block.mixer.causal:
        found.append(f"block {i} ({_name_of(model, i)}) is not causal and task {model.task} needs it to be")
    edges = {
        "reuses keys and values": block.kv_from,
        "shares the mixer weights": block.mixer_weights_from,
        "shares the ffn weights": block.ffn_weights_from,
    }
    if any(source is not None for source in edges.values()):
        found += _bad_edges(model, i, edges)
    return found


def _bad_edges(model: ModelSpec, i: int, edges: Mapping[str, int | None]) -> list[str]:
    block, found = model.blocks[i], []
    for what, source in edges.items():
        if source is not None and not 0 <= source < i:
            found.append(f"block {i} {what} of block {source}, which is not an earlier block")
    if found:
        return found
    if (j := block.kv_from) is not None:
        source_block = model.blocks[j]
        if source_block.kv_from is not None:
            found.append(f"block {i} reuses keys and values of block {j}, which has none of its own")
        elif not block.mixer.can_read(source_block.mixer, model.site(i)):
            mine, theirs = (_name_of(model, n) for n in (i, j))
            found.append(
                f"block {i} ({mine}) cannot reuse the keys and values of block {j} ({theirs}): "
                "heads, head_dim, position and norm must agree and its window may not be wider"
            )
    for what, source in (("mixer", block.mixer_weights_from), ("ffn", block.ffn_weights_from)):
        if source is not None:
            other = model.blocks[source]
            same = getattr(block, what) == getattr(other, what)
            if not same or (what == "mixer" and (block.kv_from is None) != (other.kv_from is None)):
                found.append(f"block {i} cannot share the {what} weights of block {source}: they differ")
    return found


def _name_of(model: ModelSpec, i: int) -> str:
    return model.blocks[i].mixer_name or model.blocks[i].mixer.kind


def check_model(model: ModelSpec) -> None:
    """Raise GraphError with every problem of the model."""
    found = problems(model)
    if found:
        raise GraphError("; ".join(found))


def build_graph(model: ModelSpec) -> nx.MultiDiGraph[str]:
    """The checked graph: nodes `embed`, `block.i.mixer`, `block.i.ffn`, `norm`, `head` in order of computation.

    Node attributes: `role`, `block`, `spec`, `site`, `name`, and `alone` (an ffn without a mixer).
    Edge attribute and key `kind`: residual, kv or weights; neighbours may be joined by more than one.
    Raises GraphError as `check_model` does.
    """
    import networkx as nx

    check_model(model)
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    graph.add_node("embed", role="embed")
    last = "embed"

    def join(source: str, target: str, kind: str) -> None:
        graph.add_edge(source, target, key=kind, kind=kind)

    def add(node: str, **attributes: object) -> None:
        nonlocal last
        graph.add_node(node, **attributes)
        join(last, node, "residual")
        last = node

    for i, block in enumerate(model.blocks):
        site = model.site(i)
        if block.mixer.kind != "none":
            add(f"block.{i}.mixer", role="mixer", block=i, spec=block.mixer, site=site, name=block.mixer_name)
        if block.ffn.kind != "none":
            alone = block.mixer.kind == "none"
            add(f"block.{i}.ffn", role="ffn", block=i, spec=block.ffn, site=site, name=block.ffn_name, alone=alone)
        if block.kv_from is not None:
            join(f"block.{block.kv_from}.mixer", f"block.{i}.mixer", "kv")
        for what, source in (("mixer", block.mixer_weights_from), ("ffn", block.ffn_weights_from)):
            if source is not None and getattr(block, what).kind != "none":
                join(f"block.{source}.{what}", f"block.{i}.{what}", "weights")
    add("norm", role="norm")
    add("head", role="head")
    return graph
