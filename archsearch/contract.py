"""What a mixer and an FFN are: a frozen spec that knows its cost, and a module that computes.

These are the classes to inherit; the tests that hold a family to them are in `archsearch/testing/`.

A *spec* is plain data (read from YAML, sent to workers as JSON) and never imports torch, so that spaces are
checked in a blink. A *module* is plain torch and uses no spec, so that it can be exported as it stands. (A plug-in may
keep both in one file; to check a space that names it then takes as long as importing torch.)
`call()` is the bridge: it names the module's class and the arguments that build it; the model builder calls it, the
exporter writes it out, and the two cannot drift apart.

Dimension letters, used in every shape comment:
    B batch · T time · S keys · D d_model · H heads · G key/value heads · K key dim · V value dim
    N state · E experts · F ffn hidden · C chunk
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, get_args

from pydantic import BaseModel, ConfigDict

from archsearch.quantity import span_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Site:
    """Where in a model a mixer or FFN stands.

    `reads_kv`: the keys and values come from an earlier block, so none are computed or stored here.
    """

    d_model: int
    layer_idx: int = 0
    n_layers: int = 1
    reads_kv: bool = False


@dataclass(frozen=True)
class ModuleCall:
    """A constructor call as data: `target` is `package.module:Class`; arguments may hold calls themselves."""

    target: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Import the class and call it."""
        module, _, name = self.target.partition(":")
        made = getattr(importlib.import_module(module), name)(**_built(self.arguments))
        return made  # type: ignore[no-any-return]


def _built(value: Any) -> Any:
    if isinstance(value, ModuleCall):
        return value.build()
    if isinstance(value, dict):
        return {key: _built(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_built(item) for item in value]
    return value


class Spec(BaseModel):
    """Base of everything that can be written in YAML: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class MixerSpec(Spec):
    """A token mixer (along T). Subclasses add a literal `kind` and their options.

    All counts are exact: `num_params` equals the module's parameters, `state_bytes` the tensors of `init_state`.
    """

    kind: str
    causal: ClassVar[bool] = True
    spans: ClassVar[tuple[str, ...]] = ()  # names of the fields that are a Span (tokens or fraction of context)

    def at_context(self, context: int) -> Self:
        """The same mixer with every span resolved to tokens."""
        tokens = {n: span_tokens(v, context) for n in self.spans if (v := getattr(self, n)) is not None}
        return self.model_copy(update=tokens) if tokens else self

    def check(self, site: Site) -> None:
        """Raise ValueError if the widths do not divide at this site; says which and what would do."""

    @abstractmethod
    def call(self, site: Site) -> ModuleCall:
        """The module's class and arguments at this site."""

    @abstractmethod
    def num_params(self, site: Site) -> int:
        """Parameters of the module that `call` builds; buffers are none."""

    @abstractmethod
    def flops(self, site: Site, n_tokens: int) -> int:
        """Forward FLOPs (2 per multiply-add, matrix products only) over one sequence of `n_tokens`, training form."""

    @abstractmethod
    def step_flops(self, site: Site, context: int) -> int:
        """Forward FLOPs of one decoded token when `context` tokens (it included) are in the cache."""

    @abstractmethod
    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        """Decode-time memory per sequence: KV cache in the model's dtype, recurrent state in fp32."""

    def kv_format(self, site: Site) -> Hashable | None:
        """What must agree for two mixers to share keys and values; None: this mixer has none to share."""
        return None

    def can_read(self, source: MixerSpec, site: Site) -> bool:
        """Whether this mixer can use the keys and values that `source` stores."""
        return self.kv_format(site) is not None and self.kv_format(site) == source.kv_format(site)


class FFNSpec(Spec):
    """A channel mixer (along D)."""

    kind: str

    def check(self, site: Site) -> None:
        """Raise ValueError if the widths do not fit at this site."""

    @abstractmethod
    def call(self, site: Site) -> ModuleCall:
        """The module's class and arguments at this site."""

    @abstractmethod
    def num_params(self, site: Site) -> int:
        """Parameters of the module that `call` builds; buffers are none."""

    def active_params(self, site: Site) -> int:
        """Parameters that one token passes through (fewer than all in a mixture of experts)."""
        return self.num_params(site)

    @abstractmethod
    def flops(self, site: Site, n_tokens: int) -> int:
        """Forward FLOPs over `n_tokens` tokens."""


def not_a(base: type[Spec]) -> Callable[[Any, str], str | None]:
    """What a registry asks of a plug-in's class: why it is no `base` of the name that it is entered under, or None."""

    def check(found: Any, name: str) -> str | None:
        if not (isinstance(found, type) and issubclass(found, base)):
            return f"is no {base.__name__}; inherit archsearch.contract.{base.__name__}"
        kinds = get_args(found.model_fields["kind"].annotation)
        if name not in kinds:
            return f"has kind {kinds[0] if kinds else 'of no name'!r}; kind and entry point must have one name"
        return None

    return check


class MixerModule(Protocol):
    """What every mixer module offers; `x` is [B, T, D] and so is every result.

    `seq_idx` [B, T] numbers the packed documents of a row (non-decreasing); nothing crosses from one to the next.
    `state` comes from `init_state` and is updated in place; `position` counts the tokens already in it.

    Mixers whose spec has a `kv_format` compute in two halves instead, so that a later block can use their keys and
    values: `kv = make_kv(x, state, position)`, then `attend(x, kv, position, seq_idx)`; built with `reads_kv=True`
    they own no key or value weights, `init_state` is empty, and `kv` is the source's.
    """

    def __call__(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Training form: whole sequences in parallel or in chunks."""

    def init_state(self, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """An empty decode state with room for `context` tokens."""

    def extend(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        """T more tokens after `position` (prefill, in one piece or several)."""

    def step(self, x: Tensor, state: dict[str, Tensor], position: int) -> Tensor:
        """One more token: x [B, 1, D]."""
