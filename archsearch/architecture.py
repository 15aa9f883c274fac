"""Architecture: one point of a search space with every hole filled, resolved to a list of blocks at each scale.

`Architecture.at("proxy")` and `.at("target")` give the ModelSpec that is trained and the one that is timed: same
layout, two sizes. Everything below this file (graph, cost, model, export) reads a ModelSpec and never sees a hole.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from archsearch.contract import FFNSpec, MixerSpec, Site, Spec
from archsearch.errors import UserError, did_you_mean, one_of
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.quantity import Count

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Trunk(Spec):
    """What all blocks share.

    norm_place: pre (GPT-2 on), post (norm on the branch's output, OLMo 2) or sandwich (both, Gemma 2 and 3).
    residual: plain x + f(x), or scaled x + f(x)/sqrt(2 n_blocks) (depth-muP, 2310.02244).
    """

    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # of every block and before the head
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    tie_embeddings: bool = True  # the head uses the weights of the embedding
    residual: Literal["plain", "scaled"] = "plain"


class Scale(Spec):
    """One size at which a layout is resolved."""

    n_blocks: Annotated[Count, Field(ge=1, le=4096)]  # each with a mixer and an FFN, either of which may be none
    d_model: Annotated[Count, Field(ge=8)]  # width of the residual stream
    context: Annotated[Count, Field(ge=2)]  # tokens of a row in training, and where objectives name none
    vocab_size: Annotated[Count, Field(ge=2)] | None = None  # None: the tokenizer's
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: float32 at proxy, bfloat16 at target


@dataclass(frozen=True)
class Block:
    """A mixer then an FFN. `kv_from` and the `*_weights_from` are indices of earlier blocks (edges across depth)."""

    mixer: MixerSpec
    ffn: FFNSpec
    mixer_name: str = ""  # what space.yaml calls them; not part of the identity
    ffn_name: str = ""
    kv_from: int | None = None
    mixer_weights_from: int | None = None
    ffn_weights_from: int | None = None

    @property
    def is_built_in(self) -> bool:
        """Whether its FFN and its mixer, or every one that stands side by side in it, are of ours and no plug-ins."""
        mixers = [self.mixer, *getattr(self.mixer, "of", ())]
        return self.ffn.kind in FFNS.table and all(mixer.kind in MIXERS.table for mixer in mixers)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        edges = {
            "kv_from": self.kv_from,
            "mixer_weights_from": self.mixer_weights_from,
            "ffn_weights_from": self.ffn_weights_from,
        }
        return {
            "mixer": dump(self.mixer),
            "ffn": dump(self.ffn),
            "mixer_name": self.mixer_name,
            "ffn_name": self.ffn_name,
            **{name: edge for name, edge in edges.items() if edge is not None},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Block:
        """The inverse of `to_json`."""
        rest = {name: value for name, value in data.items() if name not in ("mixer", "ffn")}
        return cls(mixer=parse_mixer(data["mixer"]), ffn=parse_ffn(data["ffn"]), **rest)


@dataclass(frozen=True)
class ModelSpec:
    """A model at one scale: sizes, trunk and the flat list of blocks."""

    d_model: int
    context: int
    vocab_size: int
    blocks: tuple[Block, ...]
    trunk: Trunk = Trunk()
    dtype: str = "float32"
    task: str = "causal_lm"

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @cached_property
    def distinct(self) -> tuple[tuple[Block, int], ...]:
        """Every block object once, with how often it stands here: deep models repeat a few."""
        counts = Counter(map(id, self.blocks))
        return tuple((block, counts[at]) for at, block in {id(block): block for block in self.blocks}.items())

    def site(self, i: int) -> Site:
        """Where block i stands."""
        return Site(self.d_model, i, len(self.blocks), reads_kv=self.blocks[i].kv_from is not None)

    def to_json(self) -> dict[str, Any]:
        """Plain data for workers, records and exports; `from_json` reads it back. Equal blocks may be one dict."""
        made = {id(block): block.to_json() for block, _ in self.distinct}
        return {
            "task": self.task,
            "d_model": self.d_model,
            "context": self.context,
            "vocab_size": self.vocab_size,
            "dtype": self.dtype,
            "trunk": dump(self.trunk),
            "blocks": [made[id(block)] for block in self.blocks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """The inverse of `to_json`; raises ValueError on data that is not a model."""
        rest = {name: value for name, value in data.items() if name not in ("trunk", "blocks")}
        return cls(
            trunk=Trunk.model_validate(data["trunk"]),
            blocks=tuple(Block.from_json(block) for block in data["blocks"]),
            **rest,
        )


@dataclass(frozen=True)
class Architecture:
    """The same layout resolved at every scale (`proxy`, `target`)."""

    scales: Mapping[str, ModelSpec]

    def at(self, scale: str) -> ModelSpec:
        """The model at one scale. Raises UserError with the scales that there are."""
        if scale not in self.scales:
            raise UserError(f"no scale {scale!r}; expected {one_of(self.scales)}.{did_you_mean(scale, self.scales)}")
        return self.scales[scale]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back. One object at every call: not to be changed."""
        return self._json

    @cached_property
    def _json(self) -> dict[str, Any]:
        return {name: model.to_json() for name, model in self.scales.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        """The inverse of `to_json`."""
        return cls({name: ModelSpec.from_json(model) for name, model in data.items()})

    @cached_property
    def arch_id(self) -> str:
        """12 hex digits of the canonical JSON: same graph, same id, whatever the names in the file."""
        return identity({name: _nameless(model) for name, model in self._json.items()})


def identity(data: Any) -> str:
    """12 hex digits of the sha256 of canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _nameless(model: dict[str, Any]) -> dict[str, Any]:
    blocks = [{k: v for k, v in b.items() if not k.endswith("_name")} for b in model["blocks"]]
    return {**model, "blocks": blocks}


def dump(spec: Spec) -> dict[str, Any]:
    """A spec as plain data: `kind` and what differs from the default, so that new options keep old ids."""
    data = spec.model_dump(mode="json", exclude_defaults=True)
    kind = getattr(spec, "kind", None)
    return {"kind": kind, **data} if kind is not None else data


def parse_mixer(data: Mapping[str, Any]) -> MixerSpec:
    """A mixer spec from plain data; raises UserError on an unknown kind, ValidationError on bad options."""
    spec: MixerSpec = MIXERS.load(data.get("kind")).model_validate(dict(data))
    return spec


def parse_ffn(data: Mapping[str, Any]) -> FFNSpec:
    """An FFN spec from plain data; raises as `parse_mixer` does."""
    spec: FFNSpec = FFNS.load(data.get("kind")).model_validate(dict(data))
    return spec
