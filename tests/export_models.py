"""Models for the export tests: together they have every kind, every edge across depth and every trunk option."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from test_contract import FFN_VARIANTS, MIXER_VARIANTS
from torch import Tensor

from archsearch.architecture import Block, ModelSpec, Trunk, parse_ffn, parse_mixer
from archsearch.choosers import RandomChooser
from archsearch.contract import FFNSpec, MixerSpec
from archsearch.recipes import recipe_names, recipes_dir
from archsearch.space import SearchSpace

CONTEXT = 96


def mixer(kind: str, **options: Any) -> MixerSpec:
    return parse_mixer({"kind": kind, **options}).at_context(CONTEXT)


def ffn(kind: str, **options: Any) -> FFNSpec:
    return parse_ffn({"kind": kind, **options})


DENSE = ffn("swiglu", expand=1)
FULL = mixer("attention", head_dim=16, kv_groups=2)
WINDOW = mixer("attention", head_dim=16, kv_groups=2, window=16)
LATENT = mixer("mla", head_dim=16, rope_dim=8)
CONV = mixer("short_conv")
GDN = mixer("gated_deltanet", head_dim=16)


def model(*blocks: Block, d_model: int = 128, vocab_size: int = 64, dtype: str = "float32", **trunk: Any) -> ModelSpec:
    return ModelSpec(d_model, CONTEXT, vocab_size, blocks, trunk=Trunk(**trunk), dtype=dtype)


def of_kind(kind: str, number: int) -> ModelSpec:
    """One of the contract tests' variants of a mixer, twice, with a convolution between."""
    variant = mixer(kind, **MIXER_VARIANTS[kind][number])
    return model(Block(variant, DENSE), Block(CONV, DENSE), Block(variant, DENSE))


def all_variants(*kinds: str) -> list[Block]:
    return [Block(mixer(kind, **options), DENSE) for kind in kinds for options in MIXER_VARIANTS[kind]]


MODELS = {
    "attention": model(*all_variants("attention"), Block(CONV, ffn("mlp")), norm_place="sandwich"),
    "decay": model(*all_variants("scalar_decay", "gla"), norm="layernorm", tie_embeddings=False),
    "state space": model(*all_variants("mamba", "mamba2", "short_conv"), norm_place="post", residual="scaled"),
    "delta rule": model(*all_variants("deltanet", "gated_deltanet", "kda")),
    "sparse": model(*all_variants("moba", "mla"), *all_variants("parallel")),
    "experts": model(*(Block(CONV, ffn(k, **o)) for k in ("moe", "mlp") for o in FFN_VARIANTS[k])),
    "shared keys and values": model(
        Block(FULL, DENSE),
        Block(WINDOW, DENSE, kv_from=0),
        Block(LATENT, DENSE),
        Block(CONV, DENSE),
        Block(FULL, DENSE, kv_from=0),
        Block(LATENT, ffn("none"), kv_from=2),
        norm_place="post",
    ),
    "shared weights": model(
        Block(CONV, ffn("mlp")),
        Block(FULL, DENSE),
        Block(FULL, DENSE, mixer_weights_from=1, ffn_weights_from=1),
        Block(WINDOW, DENSE),
        Block(LATENT, DENSE),
        Block(FULL, DENSE, mixer_weights_from=1),
        Block(CONV, DENSE, mixer_weights_from=0),
    ),
    "only experts": model(
        Block(mixer("none"), ffn("moe", n_experts=4, top_k=2, routing="sigmoid")), Block(FULL, DENSE)
    ),
    "plain": model(*[Block(FULL, DENSE)] * 3, d_model=256),
}
TEXT = model(Block(WINDOW, DENSE), Block(CONV, DENSE), Block(GDN, DENSE), d_model=32, vocab_size=257)  # of bytes


def spaces() -> list[str]:
    """All that are shipped: the recipes, then the others."""
    return [*recipe_names(), *sorted(path.stem for path in recipes_dir().parent.glob("*.yaml"))]


def space(name: str) -> SearchSpace:
    folder = recipes_dir() if name in recipe_names() else recipes_dir().parent
    return SearchSpace.load(folder / f"{name}.yaml")


def drawn(name: str, seed: int) -> ModelSpec:
    """A draw from a shipped space at proxy scale."""
    return space(name).sample(RandomChooser(seed)).architecture.at("proxy")


def few_experts(spec: ModelSpec) -> ModelSpec:
    """The same with twice as many experts as a token passes, for tests that write and read the weights."""

    def fewer(ffn: Any) -> Any:
        return ffn.model_copy(update={"n_experts": 2 * ffn.top_k}) if ffn.kind == "moe" else ffn

    return replace(spec, blocks=tuple(replace(block, ffn=fewer(block.ffn)) for block in spec.blocks))


def load(path: Path) -> ModuleType:
    """The exported file as a module of this process."""
    module = ModuleType("exported_for_a_test")
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def prompt(spec: ModelSpec, n_tokens: int = CONTEXT) -> Tensor:
    """[2, T] token ids, the same every time."""
    return torch.randint(spec.vocab_size, (2, n_tokens), generator=torch.Generator().manual_seed(3))


def token_by_token(model: Any, tokens: Tensor, prefill: int) -> Tensor:
    """Logits when the first tokens are read in one piece and the others one at a time."""
    state = model.init_state(len(tokens), tokens.shape[1])
    pieces = [model.extend(tokens[:, :prefill], state)]
    pieces += [model.extend(tokens[:, t : t + 1], state) for t in range(prefill, tokens.shape[1])]
    return torch.cat(pieces, dim=1)
