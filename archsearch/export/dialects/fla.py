"""flash-linear-attention's models: one kind of linear mixer each, and attention in the layers that `attn` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.attention import softmax_attention
from archsearch.export.dialects.base import EPS, Dialect, Layer, Names, Part, only, refuse
from archsearch.export.dialects.feedforward import swiglu
from archsearch.export.dialects.parts import rotates_all
from archsearch.mixers.attention import Attention

FLA_EPS = 1e-5  # of the norms of queries and keys in fla's attention
NEEDS = {"fla.models": "flash-linear-attention>=0.6", "transformers": "transformers>=5.14,<6"}


class Fla(Dialect):
    """Attention alone, `TransformerForCausalLM`, and what all of fla's models share; `fla_models` has the others.

    Their attention has heads of d_model / num_heads features, all rotated, no gate and no sink.
    """

    name = "fla"
    title = "fla's Transformer"
    kind: ClassVar[str] = ""  # of the linear mixer
    model_type: ClassVar[str] = "transformer"
    architecture: ClassVar[str] = "TransformerForCausalLM"
    part: ClassVar[str] = "attn."  # of a layer: its mixer
    kernels = True
    needs: ClassVar[Mapping[str, str]] = NEEDS
    names: ClassVar[Names] = Names(
        {"mixer_norm": "attn_norm.weight", "ffn_norm": "mlp_norm.weight"}, embed="model.embeddings.weight"
    )

    def for_model(self, spec: ModelSpec) -> Dialect:
        from archsearch.export.dialects.fla_models import MODELS

        kinds = [block.mixer.kind for block in spec.blocks if block.mixer.kind in MODELS]
        return MODELS[kinds[0]]() if kinds else self

    def mixer(self, spec: ModelSpec, i: int) -> Part:
        if self.kind and spec.blocks[i].mixer.kind == self.kind:
            return self.linear(spec, i)
        known = f"{self.kind} and attention" if self.kind else "attention"
        return self._attention(spec, i, softmax_attention(spec, i, self.title, known))

    def linear(self, spec: ModelSpec, i: int) -> Part:
        """The linear mixer of block i; raises Refused."""
        raise NotImplementedError

    def _attention(self, spec: ModelSpec, i: int, mixer: Attention) -> Part:
        from archsearch.export.dialects.fla_models import attention_tensors

        options = ("head_dim", "expand", "kv_groups", "position", "rope_theta", "rope_fraction", "window")
        only(spec, i, "mixer", self.title, *options, *(() if self.kind else ("qk_norm",)))
        rotates_all(spec, i, self.title, mixer)
        if mixer.n_heads(spec.site(i)) * mixer.head_dim != spec.d_model:
            refuse(
                spec, i, "mixer", f"the heads of fla's attention fill d_model, not {mixer.expand:g} of it", "expand: 1"
            )
        settings = {} if self.kind else {**attention_options(spec, i), "qk_norm": mixer.qk_norm}
        return Part("attention", settings, attention_tensors(self.part, mixer), (f"{self.part}o_proj.weight",))

    def ffn(self, spec: ModelSpec, i: int) -> Part:
        return swiglu(spec, i, self.title)

    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        hybrid = {"attn": attention_layers(spec, layers)} if self.kind else {}
        return {
            **settings,
            **hybrid,
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "hidden_act": "swish",
            "norm_eps": EPS,
            "attnres_block_size": None,
        }

    def stock_class(self, config: Mapping[str, Any]) -> Any:
        import fla.models

        return getattr(fla.models, self.architecture)

    def on_cpu(self) -> AbstractContextManager[None]:
        from archsearch.export.dialects.fla_plain import plain_functions

        return plain_functions()

    def remarks(self, spec: ModelSpec) -> tuple[str, ...]:
        told = "It was compared with plain torch functions in the place of fla's kernels, which need a GPU."
        if any(isinstance(block.mixer, Attention) for block in spec.blocks):
            return told, "Its attention needs flash-attn."
        return (told,)


def attention_options(spec: ModelSpec, i: int) -> dict[str, Any]:
    """What fla asks of attention, in `attn` or of the whole model."""
    mixer, site = spec.blocks[i].mixer, spec.site(i)
    assert isinstance(mixer, Attention)
    return {
        "num_heads": mixer.n_heads(site),
        "num_kv_heads": mixer.n_kv_heads(site),
        "qkv_bias": False,
        "window_size": mixer.window,
        "rope_theta": mixer.rope_theta,
    }


def attention_layers(spec: ModelSpec, layers: Sequence[Layer]) -> Any:
    """The `attn` of a hybrid: None, one specification, or a list of several with the layers of each."""
    groups: list[dict[str, Any]] = []
    for i, layer in enumerate(layers):
        if layer.mixer.kind == "attention":
            options = attention_options(spec, i)
            same = [group for group in groups if options.items() <= group.items()]
            if same:
                same[0]["layers"].append(i)
            else:
                groups.append({"layers": [i], **options})
    return groups if len(groups) > 1 else groups[0] if groups else None
