"""The layer graph: its nodes and edges, and the models it refuses with the words it uses."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest

from archsearch.architecture import Block, ModelSpec
from archsearch.errors import GraphError
from archsearch.ffns.none import NoFFN
from archsearch.ffns.swiglu import SwiGLU
from archsearch.graph import build_graph, check_model, problems
from archsearch.mixers.attention import Attention
from archsearch.mixers.none import NoMixer
from archsearch.mixers.short_conv import ShortConv

KINDS = ("residual", "kv", "weights")
FULL, WINDOW, CONV = Attention(head_dim=16), Attention(head_dim=16, window=8), ShortConv()


class Bidirectional(Attention):
    """Attention to both sides."""

    causal: ClassVar[bool] = False


def model(*blocks: Block, **changes: Any) -> ModelSpec:
    return ModelSpec(64, 32, 100, blocks, **changes)


def test_nodes_and_edges() -> None:
    graph = build_graph(
        model(
            Block(FULL, SwiGLU()),
            Block(NoMixer(), SwiGLU(), ffn_weights_from=0),
            Block(FULL, NoFFN(), kv_from=0),
            Block(FULL, NoFFN(), kv_from=0, mixer_weights_from=2),
        )
    )
    order = ["embed", "block.0.mixer", "block.0.ffn", "block.1.ffn", "block.2.mixer", "block.3.mixer", "norm", "head"]
    assert list(graph) == order
    edges = {kind: [(a, b) for a, b, k in graph.edges(data="kind") if k == kind] for kind in KINDS}
    assert edges["residual"] == list(itertools.pairwise(order))
    assert edges["kv"] == [("block.0.mixer", "block.2.mixer"), ("block.0.mixer", "block.3.mixer")]
    assert sorted(edges["weights"]) == [("block.0.ffn", "block.1.ffn"), ("block.2.mixer", "block.3.mixer")]
    assert graph.number_of_edges() == len(order) - 1 + 4, "neighbours may be joined by several edges"
    assert [graph.nodes[node]["role"] for node in order] == [
        *("embed", "mixer", "ffn", "ffn", "mixer", "mixer", "norm", "head")
    ]
    assert graph.nodes["block.2.mixer"]["spec"] is FULL
    assert graph.nodes["block.2.mixer"]["block"] == 2
    assert [graph.nodes[f"block.{i}.mixer"]["site"].reads_kv for i in (0, 2, 3)] == [False, True, True]


def test_a_shared_nothing_is_no_edge() -> None:
    graph = build_graph(model(Block(FULL, NoFFN()), Block(FULL, NoFFN(), ffn_weights_from=0)))
    assert {kind for _, _, kind in graph.edges(data="kind")} == {"residual"}


REFUSALS = {
    "widths that do not divide": (
        [Block(Attention(head_dim=24), SwiGLU(), mixer_name="odd")],
        "block 0 (odd): head_dim 24 does not divide the width 64",
    ),
    "nothing in a block": (
        [Block(FULL, SwiGLU()), Block(NoMixer(), NoFFN())],
        "block 1 has neither a mixer nor an ffn",
    ),
    "not causal": (
        [Block(Bidirectional(head_dim=16), SwiGLU())],
        "block 0 (attention) is not causal and task causal_lm needs it to be",
    ),
    "keys and values of a later block": (
        [Block(FULL, SwiGLU(), kv_from=1), Block(FULL, SwiGLU())],
        "block 0 reuses keys and values of block 1, which is not an earlier block",
    ),
    "keys and values of itself": (
        [Block(FULL, SwiGLU(), kv_from=0)],
        "block 0 reuses keys and values of block 0, which is not an earlier block",
    ),
    "keys and values from before the first": (
        [Block(FULL, SwiGLU(), kv_from=-1)],
        "block 0 reuses keys and values of block -1, which is not an earlier block",
    ),
    "keys and values of a reader": (
        [Block(FULL, SwiGLU()), Block(FULL, SwiGLU(), kv_from=0), Block(FULL, SwiGLU(), kv_from=1)],
        "block 2 reuses keys and values of block 1, which has none of its own",
    ),
    "keys and values of another head_dim": (
        [Block(FULL, SwiGLU()), Block(Attention(head_dim=32), SwiGLU(), kv_from=0, mixer_name="wide")],
        "block 1 (wide) cannot reuse the keys and values of block 0 (attention)",
    ),
    "keys and values of a narrower window": (
        [Block(WINDOW, SwiGLU(), mixer_name="swa"), Block(FULL, SwiGLU(), kv_from=0, mixer_name="full")],
        "block 1 (full) cannot reuse the keys and values of block 0 (swa)",
    ),
    "keys and values of a convolution": (
        [Block(CONV, SwiGLU()), Block(CONV, SwiGLU(), kv_from=0)],
        "block 1 (short_conv) cannot reuse the keys and values of block 0 (short_conv)",
    ),
    "mixer weights of a later block": (
        [Block(FULL, SwiGLU(), mixer_weights_from=1), Block(FULL, SwiGLU())],
        "block 0 shares the mixer weights of block 1, which is not an earlier block",
    ),
    "ffn weights of a later block": (
        [Block(FULL, SwiGLU(), ffn_weights_from=7)],
        "block 0 shares the ffn weights of block 7, which is not an earlier block",
    ),
    "weights of another mixer": (
        [Block(FULL, SwiGLU()), Block(WINDOW, SwiGLU(), mixer_weights_from=0)],
        "block 1 cannot share the mixer weights of block 0: they differ",
    ),
    "weights of another ffn": (
        [Block(FULL, SwiGLU()), Block(FULL, SwiGLU(expand=2), ffn_weights_from=0)],
        "block 1 cannot share the ffn weights of block 0: they differ",
    ),
    "a reader's weights for a mixer with keys": (
        [Block(FULL, SwiGLU()), Block(FULL, SwiGLU(), kv_from=0), Block(FULL, SwiGLU(), mixer_weights_from=1)],
        "block 2 cannot share the mixer weights of block 1: they differ",
    ),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_is_no_model_is_refused(why: str) -> None:
    blocks, message = REFUSALS[why]
    spec = model(*blocks)
    assert len(problems(spec)) == 1
    assert problems(spec)[0].startswith(message)
    for refuse in (check_model, build_graph):
        with pytest.raises(GraphError) as caught:
            refuse(spec)
        assert str(caught.value).startswith(message)


def test_all_problems_come_at_once() -> None:
    spec = model(Block(NoMixer(), NoFFN()), Block(Attention(head_dim=24), SwiGLU()), Block(CONV, SwiGLU(), kv_from=5))
    found = problems(spec)
    assert [line.split(":")[0] for line in found] == [
        "block 0 has neither a mixer nor an ffn",
        "block 1 (attention)",
        "block 2 reuses keys and values of block 5, which is not an earlier block",
    ]
    with pytest.raises(GraphError) as caught:
        check_model(spec)
    assert all(line in str(caught.value) for line in found)


def test_other_tasks_may_see_both_sides() -> None:
    blocks = (Block(Bidirectional(head_dim=16), SwiGLU()),)
    assert problems(model(*blocks, task="masked_lm")) == []


def test_a_narrower_window_may_read() -> None:
    assert problems(model(Block(FULL, SwiGLU()), Block(WINDOW, SwiGLU(), kv_from=0))) == []
