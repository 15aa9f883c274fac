"""ModelSpec to nn.Module: the language model, its initialisation and its decode state.

Initialisation and learning-rate classes follow the maximal-update rules for Adam (Tensor Programs V, 2203.03466) so
that one learning rate serves every width; see `docs/design/0003-width.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from archsearch.architecture import ModelSpec
from archsearch.graph import check_model
from archsearch.modules.block import Block, make_norm

BASE_WIDTH = 256  # at this width the rules below are the standard parametrisation
EMBED_STD = 0.02


@dataclass
class DecodeState:
    """Caches and recurrent states of every block, how many tokens they hold and have room for (None: no bound)."""

    blocks: list[dict[str, Tensor]]
    position: int = 0
    context: int | None = None

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for block in self.blocks for t in block.values())


class HybridLM(nn.Module):
    """A decoder-only language model from a ModelSpec.

    The embedding's output is scaled to unit variance; the logits by BASE_WIDTH / d_model when d_model differs from
    the base, so that their size does not depend on the width (2203.03466, table 8).
    """

    def __init__(self, spec: ModelSpec) -> None:
        check_model(spec)
        super().__init__()
        self.spec = spec
        # from_pretrained skips the default fill, which on meta would import torch._dynamo (seconds)
        table = torch.empty(spec.vocab_size, spec.d_model)
        self.embed: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
        self.blocks = nn.ModuleList(self._block(i) for i in range(spec.n_blocks))
        self._tie_blocks()
        self.norm = make_norm(spec.trunk.norm, spec.d_model)
        self.head = nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        if spec.trunk.tie_embeddings:
            self.head.weight = self.embed.weight
        self.embed_scale = 1.0 / EMBED_STD
        self.logit_scale = BASE_WIDTH / spec.d_model

    def _block(self, i: int) -> Block:
        spec, trunk = self.spec.blocks[i], self.spec.trunk
        site = self.spec.site(i)
        sources = {b.kv_from for b in self.spec.blocks}
        return Block(
            d_model=self.spec.d_model,
            mixer=None if spec.mixer.kind == "none" else spec.mixer.call(site).build(),
            ffn=None if spec.ffn.kind == "none" else spec.ffn.call(site).build(),
            norm=trunk.norm,
            norm_place=trunk.norm_place,
            residual_scale=1.0 if trunk.residual == "plain" else (2 * self.spec.n_blocks) ** -0.5,
            shares_kv=spec.kv_from is not None or i in sources,
        )

    def _tie_blocks(self) -> None:
        blocks: list[Any] = list(self.blocks)
        for i, spec in enumerate(self.spec.blocks):
            if spec.mixer_weights_from is not None:
                blocks[i].mixer = blocks[spec.mixer_weights_from].mixer
            if spec.ffn_weights_from is not None:
                blocks[i].ffn = blocks[spec.ffn_weights_from].ffn

    def hidden(self, tokens: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Final normed activations [B, T, D] of tokens [B, T]. Raises ValueError on tokens of another shape."""
        _check_tokens(tokens)
        x = self.embed(tokens) * self.embed_scale
        kvs: dict[int, Any] = {}
        for i, block in enumerate(self.blocks):
            source = self.spec.blocks[i].kv_from
            x, kv = block(x, seq_idx, None if source is None else kvs[source])
            if block.shares_kv:
                kvs[i] = kv
        out: Tensor = self.norm(x)
        return out

    def forward(self, tokens: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab]. `seq_idx` [B, T] numbers packed documents; nothing crosses between them."""
        logits: Tensor = self.head(self.hidden(tokens, seq_idx)) * self.logit_scale
        return logits

    def init_state(self, batch: int, context: int, dtype: torch.dtype | None = None) -> DecodeState:
        """An empty decode state for `batch` sequences of up to `context` tokens."""
        weight = self.embed.weight
        states = []
        for i, block in enumerate(self.blocks):
            mixer: Any = block.mixer
            empty = mixer is None or self.spec.blocks[i].kv_from is not None
            made = {} if empty else mixer.init_state(batch, context, weight.device, dtype or weight.dtype)
            states.append(made)
        return DecodeState(states, context=context)

    def extend(self, tokens: Tensor, state: DecodeState, last_only: bool = False) -> Tensor:
        """Logits [B, T, vocab] of T more tokens after those in the state, which is updated: prefill and decode.

        `last_only`: logits [B, 1, vocab] of the last token, which is all that a prompt is read for.
        Raises ValueError on tokens of another shape, and where the state has no room for them.
        """
        _check_tokens(tokens)
        end = state.position + tokens.shape[1]
        if state.context is not None and end > state.context:
            raise ValueError(
                f"{tokens.shape[1]} more tokens after {state.position} do not fit a state of {state.context}; "
                f"write init_state(batch, context={end}) or more"
            )
        x = self.embed(tokens) * self.embed_scale
        kvs: dict[int, Any] = {}
        blocks: list[Any] = list(self.blocks)
        for i, block in enumerate(blocks):
            source = self.spec.blocks[i].kv_from
            x, kv = block.extend(x, state.blocks[i], state.position, None if source is None else kvs[source])
            if block.shares_kv:
                kvs[i] = kv
        state.position += tokens.shape[1]
        x = x[:, -1:] if last_only else x
        logits: Tensor = self.head(self.norm(x)) * self.logit_scale
        return logits


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"tokens have the shape {list(tokens.shape)}; expected [batch, time], such as tokens[None]")


def init_weights(model: HybridLM, seed: int) -> None:
    """Fill every parameter, on whatever device it lives; the same seed gives the same values.

    | what                                | initial value                                     |
    | ----------------------------------- | ------------------------------------------------- |
    | embedding, and the head if untied   | N(0, 0.02^2)                                      |
    | matrix with d_in input features     | N(0, 1 / d_in)                                    |
    | norm weights                        | 1                                                 |
    | everything else                     | its module's own `reset_parameters`               |
    """
    ready = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm)
    device = model.embed.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                nn.init.ones_(module.weight)
        for module in reversed(list(model.modules())):  # children first, so that a parent has the last word
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and not isinstance(module, ready):
                reset()
        nn.init.normal_(model.embed.weight, std=EMBED_STD)
        # the head is a Linear and was filled above; to leave it out there would give every seed other values
        if not model.spec.trunk.tie_embeddings:
            nn.init.normal_(model.head.weight, std=EMBED_STD)


def build_model(spec: ModelSpec, seed: int = 0, device: str = "cpu", dtype: torch.dtype | None = None) -> HybridLM:
    """Build on meta, place once, initialise: torch's own fills of its layers run on meta, where they cost nothing."""
    with torch.device("meta"):
        model = HybridLM(spec)
    model = model.to(dtype) if dtype is not None else model
    # as to_empty, whose empty_like of a meta tensor would import sympy (a second)
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))  # type: ignore[no-untyped-call]
    if spec.trunk.tie_embeddings:
        model.head.weight = model.embed.weight
    init_weights(model, seed)
    return model


def hidden_matrices(spec: ModelSpec) -> frozenset[str]:
    """Names of the parameters inside the blocks whose fan-in grows with the width.

    Which do is read off a second model of twice the width, on meta (the way of microsoft/mup's base shapes). Norms,
    convolutions and per-head scalars do not; the embedding and the head are not inside a block.
    """
    with torch.device("meta"):
        one = HybridLM(spec).blocks.named_parameters()
        two = dict(HybridLM(replace(spec, d_model=2 * spec.d_model)).blocks.named_parameters())
    return frozenset(f"blocks.{name}" for name, p in one if p.dim() >= 2 and two[name].shape[-1] > 1.5 * p.shape[-1])


def width_multipliers(spec: ModelSpec) -> dict[str, float]:
    """Learning-rate factor of each parameter under Adam: BASE_WIDTH / d_model for hidden matrices, else 1.

    The head needs none: its logits are already scaled by BASE_WIDTH / d_model (2203.03466, table 8).
    """
    hidden = hidden_matrices(spec)
    with torch.device("meta"):
        names = [name for name, _ in HybridLM(spec).named_parameters()]
    return {name: BASE_WIDTH / spec.d_model if name in hidden else 1.0 for name in names}


def num_params(model: nn.Module) -> int:
    """All parameters, frozen ones too, shared ones once; buffers are none."""
    return sum(p.numel() for p in model.parameters())
