"""Softmax attention in the names that most stock classes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.base import Tensors, refuse
from archsearch.mixers.attention import Attention

if TYPE_CHECKING:
    from torch import Tensor

ROTATED = ("head_dim", "expand", "kv_groups", "position", "rope_theta", "rope_fraction", "qk_norm")


def softmax_attention(spec: ModelSpec, i: int, title: str, expected: str) -> Attention:
    """The mixer of block i if it is plain or sliding-window attention without a sink; else it is refused."""
    mixer = spec.blocks[i].mixer
    if not isinstance(mixer, Attention):
        refuse(spec, i, "mixer", f"{title} knows {expected} only", "attention")
    if mixer.sink:
        refuse(spec, i, "mixer", f"the attention of {title} has no sink", "sink: false")
    return mixer


def heads(spec: ModelSpec, i: int, mixer: Attention) -> dict[str, int]:
    """The settings that give the sizes of attention in most configurations."""
    site = spec.site(i)
    return {
        "num_attention_heads": mixer.n_heads(site),
        "num_key_value_heads": mixer.n_kv_heads(site),
        "head_dim": mixer.head_dim,
    }


def renamed(prefix: str, norm_offset: float = 0.0) -> Callable[[Tensors], dict[str, Tensor]]:
    """Every tensor under the same name after `prefix`; norms of queries and keys less `norm_offset`."""

    def tensors(own: Tensors) -> dict[str, Tensor]:
        return {prefix + name: t - norm_offset if name.endswith("_norm.weight") else t for name, t in own.items()}

    return tensors
