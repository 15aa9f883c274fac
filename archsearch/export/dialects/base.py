"""What a dialect is: a stock model class, and how a search model's blocks become its layers, exactly or not at all.

A dialect answers for each block with two `Part`s, for the mixer and for the FFN: settings of the stock configuration
that the part needs (one value for the whole model: where two blocks differ, the later one is refused) and how the
part's tensors are called there. What every model has is done once, in `weights`: the embedding's scale, the logits'
scale, the residual's scale and the norms.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from archsearch.architecture import ModelSpec
from archsearch.contract import Spec
from archsearch.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Role = Literal["mixer", "ffn"]
EPS = 1e-6  # of every norm of the search model


class Refused(ExportError):
    """A model that a dialect cannot express; `block` is the one that stops it, None if no single block does."""

    def __init__(self, where: str, why: str, expected: str, block: int | None = None) -> None:
        self.block = block
        super().__init__(f"{where}: {why}; expected {expected}")


@dataclass(frozen=True)
class Part:
    """A mixer or an FFN in the words of a dialect.

    kind: what the dialect calls this kind of part (`full_attention`, `moe`); its `config` may list it by layer.
    settings: keys of the stock configuration that this part determines; every block must agree.
    tensors: from the part's tensors in the search model, by their names there (`q_proj.weight`), to those of the stock
    layer, by their names in the layer (`self_attn.q_proj.weight`). A pure function: it is also called on meta.
    outputs: those of them that the part's output is linear in, biases included; they take up the residual's scale.
    added: tensors among them that the search model has no parameter for, and what they do, which must be nothing:
    {`mlp.shared_expert_gate.weight`: `zeros: the shared expert is halved, its weights are doubled`}.
    """

    kind: str
    settings: Mapping[str, Any]
    tensors: Callable[[Tensors], dict[str, Tensor]]
    outputs: tuple[str, ...]
    added: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """A block in the words of a dialect."""

    mixer: Part
    ffn: Part


@dataclass(frozen=True)
class Names:
    """What the stock class calls the tensors that every model has.

    layer: with `{i}`. norms: in a layer, by the names of `archsearch.modules.block.Block` (mixer_norm, mixer_post_norm,
    ffn_norm, ffn_post_norm); exactly those that the stock layer has.
    """

    norms: Mapping[str, str]
    embed: str = "model.embed_tokens.weight"
    layer: str = "model.layers.{i}."
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


class Dialect(ABC):
    """One stock class, or one family of them."""

    name: ClassVar[str]  # what --format says
    title: ClassVar[str]  # what people call the model
    names: ClassVar[Names]
    needs: ClassVar[Mapping[str, str]] = {"transformers": "transformers>=5.14,<6"}  # package: what to install
    kernels: ClassVar[bool] = False  # whether the class has kernels of its own, which `on_cpu` replaces
    norm_offset: ClassVar[float] = 0.0  # norms of blocks and the final one multiply by this + their weight

    def for_model(self, spec: ModelSpec) -> Dialect:
        """The member of a family that this model goes to; by default there is one."""
        return self

    @abstractmethod
    def mixer(self, spec: ModelSpec, i: int) -> Part:
        """The mixer of block i; raises Refused."""

    @abstractmethod
    def ffn(self, spec: ModelSpec, i: int) -> Part:
        """The FFN of block i; raises Refused."""

    @abstractmethod
    def config(self, spec: ModelSpec, layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The stock configuration beyond what `folder` always writes (sizes, vocabulary, dtype, tokens).

        settings: those of all parts. The result has `model_type`, `architectures`, the norms' eps, the layer types.
        Raises Refused if the layers cannot stand together (a pattern that the class derives from a period, say).
        """

    @abstractmethod
    def stock_class(self, config: Mapping[str, Any]) -> Any:
        """The class that loads the folder, such as transformers.Qwen3NextForCausalLM."""

    def check_trunk(self, spec: ModelSpec) -> None:
        """Raise Refused if norms or their place are not those of the stock layer. By default: RMSNorm, before."""
        need(spec.trunk.norm == "rmsnorm", f"{self.title} has RMSNorm, not {spec.trunk.norm}", "trunk.norm: rmsnorm")
        place = spec.trunk.norm_place
        need(place == "pre", f"{self.title} norms the input of every branch, not {place}", "trunk.norm_place: pre")

    def check_layout(self, spec: ModelSpec, layers: Sequence[Layer]) -> None:  # noqa: B027
        """Raise Refused if the stock class wants more of a model than layers that are fine alone. By default: no."""

    def embed_scale(self, spec: ModelSpec) -> float:
        """What the stock class multiplies its embedding's output by."""
        return 1.0

    def on_cpu(self) -> AbstractContextManager[None]:
        """Within it the stock class can be built and run without a GPU, whatever its library prefers."""
        return nullcontext()

    def remarks(self, spec: ModelSpec) -> tuple[str, ...]:
        """What somebody who takes the folder should know, in sentences."""
        return ()


def need(condition: bool, why: str, expected: str) -> None:
    """Raise Refused about the trunk unless `condition`."""
    if not condition:
        raise Refused("the trunk", why, expected)


def refuse(spec: ModelSpec, i: int, role: Role, why: str, expected: str) -> NoReturn:
    """Raise Refused about one half of block i."""
    block = spec.blocks[i]
    part = block.mixer if role == "mixer" else block.ffn
    name = block.mixer_name if role == "mixer" else block.ffn_name
    label = part.kind if name in ("", part.kind) else f"{name}, {part.kind}"
    raise Refused(f"block {i} ({label})", why, expected, i)


def only(spec: ModelSpec, i: int, role: Role, title: str, *options: str) -> None:
    """Refuse block i if an option besides `options` has another value than its default: none is left out silently."""
    part: Spec = getattr(spec.blocks[i], role)
    for name in type(part).model_fields:
        value, default = getattr(part, name), type(part).model_fields[name].default
        if name not in (*options, "kind") and value != default:
            refuse(spec, i, role, f"{title} knows no {name} {value}", f"{name}: {_yaml(default)}")


def share(part: int, whole: int) -> float:
    """part / whole, such that `int(whole * it)`, which is what stock classes compute, is part again."""
    found = part / whole
    return found if int(whole * found) == part else math.nextafter(found, math.inf)


def _yaml(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
