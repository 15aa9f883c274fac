"""What the search model calls its tensors, and what transformers does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from archsearch.architecture import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

PREFIXES = {"embed.": "model.embed_tokens.", "blocks.": "model.layers.", "norm.": "model.norm.", "head.": "lm_head."}


def hub_name(name: str) -> str:
    """`blocks.3.mixer.q_proj.weight` is `model.layers.3.mixer.q_proj.weight`."""
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    return PREFIXES[prefix] + name.removeprefix(prefix)


def shared_names(spec: ModelSpec, names: Iterable[str]) -> set[str]:
    """Those of a search model's tensors that are another's under a second name."""
    shared = {"head.weight"} if spec.trunk.tie_embeddings else set()
    readers = [(i, "mixer") for i, b in enumerate(spec.blocks) if b.mixer_weights_from is not None]
    readers += [(i, "ffn") for i, b in enumerate(spec.blocks) if b.ffn_weights_from is not None]
    return shared | {name for name in names for i, part in readers if re.match(rf"blocks\.{i}\.{part}\.", name)}


def hub_state(spec: ModelSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A search model's tensors by transformers' names, shared ones once."""
    shared = shared_names(spec, state)
    return {hub_name(name): tensor for name, tensor in state.items() if name not in shared}
