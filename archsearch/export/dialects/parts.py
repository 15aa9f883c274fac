"""What the dialects with renamed layers share: tensors under other names, whole heads rotated, stacked experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.base import Layer, Refused, Tensors, refuse
from archsearch.mixers.attention import Attention

if TYPE_CHECKING:
    from torch import Tensor

QKVO = {f"{name}_proj.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"}
ONLY_THE_LOSS = ("aux_loss", "z_loss", "bias_rate")  # options of a MoE that its output does not depend on


def mapped(names: Mapping[str, str], conv: str | None = None) -> Callable[[Tensors], dict[str, Tensor]]:
    """Tensors under other names, from ours to theirs; that of `conv` [C, taps] as nn.Conv1d has it, [C, 1, taps]."""

    def tensors(own: Tensors) -> dict[str, Tensor]:
        made = {theirs: own[ours] for ours, theirs in names.items()}
        if conv is not None:
            made[names[conv]] = own[conv].unsqueeze(1)
        return made

    return tensors


def rotates_all(spec: ModelSpec, i: int, title: str, mixer: Attention) -> None:
    """Refuse block i unless RoPE turns all features of its heads."""
    if mixer.position != "rope":
        refuse(spec, i, "mixer", f"{title} rotates queries and keys, this block does not", "position: rope")
    if mixer.rope_dims() != mixer.head_dim:
        why = f"{title} rotates all features of a head, this block {mixer.rope_dims()} of {mixer.head_dim}"
        refuse(spec, i, "mixer", why, "rope_fraction: 1 and an even head_dim")


def has_attention(layers: Sequence[Layer], kind: str, title: str) -> None:
    """Refuse a model without a layer of softmax attention: transformers' cache counts its tokens in one."""
    if all(layer.mixer.kind != kind for layer in layers):
        why = f"no block has attention, and the cache of {title}'s class counts the tokens in a layer of attention"
        raise Refused("the layout", why, "attention in one block at least")


def stacked(own: Tensors, prefix: str, scale: float = 1.0) -> dict[str, Tensor]:
    """The experts as transformers has them: gate above up [E, 2 F, D], and down [E, D, F] times `scale`."""
    import torch

    gate_up = torch.cat([own["gate_proj"], own["up_proj"]], dim=1)
    return {f"{prefix}gate_up_proj": gate_up, f"{prefix}down_proj": own["down_proj"] * scale}
