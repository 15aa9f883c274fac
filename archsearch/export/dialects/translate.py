"""From a search model to a dialect's configuration and tensors: what all dialects have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.base import Dialect, Layer, Part, Role, Tensors, refuse

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Translation:
    """A search model in the words of a dialect: its configuration, and how its tensors go."""

    dialect: Dialect
    spec: ModelSpec
    layers: tuple[Layer, ...]
    config: Mapping[str, Any]

    def added(self) -> dict[str, str]:
        """Stock tensors that the search model has no parameter for, and why they change nothing."""
        found: dict[str, str] = {}
        for i, layer in enumerate(self.layers):
            at = self.dialect.names.layer.format(i=i)
            found |= {at + name: why for part in (layer.mixer, layer.ffn) for name, why in part.added.items()}
        return found

    def tensors(self, state: Tensors) -> dict[str, Tensor]:
        """A state dict of the search model as one of the stock class, in the precision of `state`.

        The search model scales its embedding by 1/EMBED_STD, its logits by BASE_WIDTH/d_model and, if it is told to,
        what a block adds. The stock class does none of it, so the factors go into the weights: where the embedding is
        tied, the one for the logits into the final norm. Give float32, in which nothing is lost that matters; what
        does not fit into the model's own dtype is kept wide (see `folder`).
        """
        from archsearch.model import BASE_WIDTH, EMBED_STD

        spec, names, offset = self.spec, self.dialect.names, self.dialect.norm_offset
        in_scale = 1.0 / EMBED_STD / self.dialect.embed_scale(spec)
        out_scale = BASE_WIDTH / spec.d_model
        made = {names.embed: state["embed.weight"] * in_scale}
        if spec.trunk.tie_embeddings:
            out_scale /= in_scale
        else:
            made[names.head] = state["head.weight"] * out_scale
            out_scale = 1.0
        made[names.final_norm] = state["norm.weight"] * out_scale - offset
        for i in range(spec.n_blocks):
            made |= self._layer(i, state)
        return made

    def _layer(self, i: int, state: Tensors) -> dict[str, Tensor]:
        names, at = self.dialect.names, self.dialect.names.layer.format(i=i)
        after = self.spec.trunk.norm_place in ("post", "sandwich")
        scale = 1.0 if self.spec.trunk.residual == "plain" else (2 * self.spec.n_blocks) ** -0.5
        made = {}
        for ours, theirs in names.norms.items():
            on_output = scale if ours.endswith("_post_norm") else 1.0
            made[at + theirs] = state[f"blocks.{i}.{ours}.weight"] * on_output - self.dialect.norm_offset
        for role, part in (("mixer", self.layers[i].mixer), ("ffn", self.layers[i].ffn)):
            prefix = f"blocks.{i}.{role}."
            found = part.tensors({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
            if scale != 1.0 and not after:
                found |= {name: found[name] * scale for name in part.outputs}
            made |= {at + name: tensor for name, tensor in found.items()}
        return made


def translate(dialect: Dialect, spec: ModelSpec) -> Translation:
    """The model in the words of the dialect; raises Refused with what cannot be said."""
    dialect = dialect.for_model(spec)
    dialect.check_trunk(spec)
    layers = tuple(
        Layer(_part(dialect, spec, i, "mixer"), _part(dialect, spec, i, "ffn")) for i in range(spec.n_blocks)
    )
    config = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_blocks,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.trunk.tie_embeddings,
        "dtype": spec.dtype,
        "use_cache": True,
    }
    settings = _agreed(dialect, spec, layers)
    return Translation(dialect, spec, layers, config | dialect.config(spec, layers, settings))


def _part(dialect: Dialect, spec: ModelSpec, i: int, role: Role) -> Part:
    block, title = spec.blocks[i], dialect.title
    if role == "mixer" and block.kv_from is not None:
        why = f"it reads the keys and values of block {block.kv_from}, and no layer of {title} reads another's"
        refuse(spec, i, role, why, "a block with its own")
    source = block.mixer_weights_from if role == "mixer" else block.ffn_weights_from
    if source is not None:
        why = f"it shares its {role} weights with block {source}, and every layer of {title} has its own"
        refuse(spec, i, role, why, "a block with its own")
    return dialect.mixer(spec, i) if role == "mixer" else dialect.ffn(spec, i)


def _agreed(dialect: Dialect, spec: ModelSpec, layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The settings of all parts; where two differ, the later block is refused."""
    agreed: dict[str, Any] = {}
    first: dict[str, int] = {}
    for i, layer in enumerate(layers):
        roles: tuple[tuple[Role, Part], ...] = (("mixer", layer.mixer), ("ffn", layer.ffn))
        for role, part in roles:
            for key, value in part.settings.items():
                if agreed.setdefault(key, value) != value:
                    why = f"its {key} is {value}, that of block {first[key]} is {agreed[key]}"
                    why += f", and {dialect.title} has one"
                    refuse(spec, i, role, why, f"{key} {agreed[key]} in every such block")
                first.setdefault(key, i)
    return agreed
