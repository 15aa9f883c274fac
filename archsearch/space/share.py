"""Sharing across depth: which blocks read another block's keys and values, and which use another's weights.

kv:      {span: n}        of every n successive blocks of one mixer the first keeps the cache (CLA, 2405.12981)
         {from: middle}   from there up, all blocks of a mixer use one cache: the last such block's below, or where
                          there is none the first one's above (YOCO, 2405.05254); a fraction such as 5/8 also works
A block that could not read the other's cache (its window is wider, say) keeps its own.

weights: {mixer: name}    all blocks of that mixer use one set of weights (Zamba, 2405.16712); likewise {ffn: name};
                          of a list of names one set each (Zamba2, 2411.15242)
         {span: n}        n successive equal blocks use one set of weights (MobileLLM, 2402.14905)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from archsearch.architecture import Block
from archsearch.contract import Site, Spec
from archsearch.quantity import parse_number


def _depth(value: object) -> float:
    if value == "middle":
        return 0.5
    depth = parse_number(value)
    if not 0 < depth < 1:
        raise ValueError(f"found {value!r}; expected middle or a fraction of the depth such as 5/8")
    return depth


def _names(value: object) -> object:
    return [value] if isinstance(value, str) else value


Depth = Annotated[float, BeforeValidator(_depth)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
SpanLength = Annotated[int, Field(ge=2)]


class ShareKV(Spec):
    """One of `span` and `from`."""

    span: SpanLength | None = None  # so many successive blocks of one mixer read the first one's cache (CLA)
    from_: Depth | None = Field(default=None, alias="from")  # blocks above it read one cache (YOCO)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.span is None) == (self.from_ is None):
            found = "neither span nor from" if self.span is None else "both span and from"
            raise ValueError(f"has {found}; expected one of them, such as {{span: 2}} or {{from: middle}}")
        return self


class ShareWeights(Spec):
    """Any of `mixer`, `ffn` (names) and `span`."""

    mixer: Names = ()  # all blocks of this mixer use one set of weights (Zamba); of several, one set each (Zamba2)
    ffn: Names = ()  # likewise of these FFNs
    span: SpanLength | None = None  # so many successive equal blocks do (MobileLLM)

    @model_validator(mode="after")
    def _some_way(self) -> Self:
        if not self.mixer and not self.ffn and self.span is None:
            raise ValueError("has none of mixer, ffn and span; expected at least one, such as {span: 2}")
        return self


class Share(Spec):
    """The `share` section."""

    kv: ShareKV | Literal["none"] = "none"
    weights: ShareWeights | Literal["none"] = "none"


def apply_share(blocks: Sequence[Block], share: Share, d_model: int) -> list[Block]:
    """The same blocks with their edges across depth."""
    made = list(blocks)
    if share.kv != "none":
        for i, source in _kv_edges(made, share.kv, d_model).items():
            made[i] = replace(made[i], kv_from=source)
    if share.weights != "none":
        made = _weight_edges(made, share.weights)
    return made


def _kv_edges(blocks: Sequence[Block], share: ShareKV, d_model: int) -> dict[int, int]:
    of_name: dict[str, list[int]] = {}
    for i, block in enumerate(blocks):
        if block.mixer.kv_format(Site(d_model, i, len(blocks))) is not None:
            of_name.setdefault(block.mixer_name, []).append(i)
    edges: dict[int, int] = {}

    def readable(i: int, source: int) -> bool:
        return blocks[i].mixer.can_read(blocks[source].mixer, Site(d_model, i, len(blocks)))

    for places in of_name.values():
        if share.span is not None:
            for at, i in enumerate(places):
                first = places[at - at % share.span]
                if first != i and readable(i, first):
                    edges[i] = first
        if share.from_ is not None:
            bound = math.ceil(share.from_ * len(blocks))
            below = [i for i in places if i < bound and i not in edges]
            above = [i for i in places if i >= bound]
            source = below[-1] if below else (above[0] if above else None)
            edges.update({i: source for i in above if source is not None and i != source and readable(i, source)})
    return edges


def _weight_edges(blocks: list[Block], share: ShareWeights) -> list[Block]:
    made = list(blocks)
    first: dict[tuple[str, str], int] = {}
    for i, block in enumerate(blocks):
        if block.mixer_name in share.mixer and (source := first.setdefault(("mixer", block.mixer_name), i)) != i:
            made[i] = replace(made[i], mixer_weights_from=source)
        if block.ffn_name in share.ffn and (source := first.setdefault(("ffn", block.ffn_name), i)) != i:
            made[i] = replace(made[i], ffn_weights_from=source)
        if share.span is not None and i % share.span:
            source = i - i % share.span
            if _same(blocks[source], block):
                made[i] = replace(made[i], mixer_weights_from=source, ffn_weights_from=source)
    return made


def _same(a: Block, b: Block) -> bool:
    return a.mixer == b.mixer and a.ffn == b.ffn and (a.kv_from is None) == (b.kv_from is None)
