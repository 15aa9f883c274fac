"""Layouts that stock classes know, and the comparison with them, for the tests of dialects."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from archsearch import cost
from archsearch.architecture import ModelSpec
from archsearch.export import export_model
from archsearch.export.dialects import dialect
from archsearch.export.dialects.parity import plain_torch
from archsearch.export.dialects.translate import translate
from archsearch.model import HybridLM, build_model
from archsearch.recipes import First, recipe_path
from archsearch.space import SearchSpace

SCALE = "{n_blocks: %d, d_model: %d, context: 96, dtype: %s%s}"


def resolved(text: str, n_blocks: int, d_model: int = 64, dtype: str = "float32", vocab_size: int = 61) -> ModelSpec:
    """The model that the layout in `text` is at these sizes."""
    proxy, target = (SCALE % (n_blocks, d_model, dtype, vocab) for vocab in ("", f", vocab_size: {vocab_size}"))
    head = f"archsearch: 1\nname: tiny\nscales: {{proxy: {proxy}, target: {target}}}\n"
    return SearchSpace.from_text(head + text).sample(First()).architecture.at("target")


def recipe(name: str, n_blocks: int, d_model: int = 64, **changes: str) -> ModelSpec:
    """A shipped one with heads of 16, at a small width."""
    text = recipe_path(name).read_text().replace("head_dim: 64", "head_dim: 16")
    for option, value in changes.items():
        text = re.sub(rf"{option}: [^,}}]+", f"{option}: {value}", text)
    return resolved(text[text.index("mixers:") :], n_blocks, d_model)


def layout(mixers: str, blocks: str, ffns: str = "", trunk: str = "", **sizes: Any) -> ModelSpec:
    """`a a b` of the mixers; the FFNs likewise after a `;`, else a dense one in each block."""
    blocks, _, ffn_blocks = blocks.partition(";")
    names = blocks.split()
    ffn_names = ffn_blocks.split() or ["d"] * len(names)
    ffns = ", ".join(filter(None, ["d: {kind: swiglu, expand: 1}", ffns]))
    places = f"mixer: {{blocks: [{', '.join(names)}]}}, ffn: {{blocks: [{', '.join(ffn_names)}]}}"
    text = f"mixers: {{{mixers}}}\nffns: {{{ffns}}}\ntrunk: {{{trunk}}}\nlayout: {{{places}}}\n"
    return resolved(text, len(names), **sizes)


def shaken(spec: ModelSpec) -> HybridLM:
    """A model in which no bias is 0 and no norm 1, in its own dtype, so that every tensor has to be in its place."""
    model = build_model(spec, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor.to(getattr(torch, spec.dtype)))
    return model


def same_as_stock(spec: ModelSpec, name: str, folder: Path, added: int = 0) -> Any:
    """Export, load it as anybody would, compare logits and greedy tokens; returns the stock model."""
    from transformers import AutoModelForCausalLM

    search = shaken(spec)
    export_model(spec, folder, weights=search.state_dict(), name="tiny", format=name)
    assert not list(folder.glob("*.py"))
    with ExitStack() as stack:
        stack.enter_context(translate(dialect(name), spec).dialect.on_cpu())
        stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        stack.enter_context(plain_torch(type(stock)))
        assert type(stock).__module__.split(".")[:2] == ["fla" if name == "fla" else "transformers", "models"]
        assert sum(p.numel() for p in stock.parameters()) == cost.params(spec) + added
        tokens = torch.randint(spec.vocab_size, (1, 70), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected, found = search(tokens), stock(tokens, use_cache=False).logits
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert_same_greedy(search, stock, tokens)
    return stock


def assert_same_greedy(search: HybridLM, stock: Any, prompt: torch.Tensor) -> None:
    """`generate` of the stock class chooses the 20 tokens after a prompt [B, T] that the search model's steps do."""
    ways: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    told = stock.generate(prompt, attention_mask=torch.ones_like(prompt), **ways)
    state, piece, own = search.init_state(len(prompt), prompt.shape[1] + 20), prompt, []
    for _ in range(20):
        piece = search.extend(piece, state, last_only=True).argmax(-1)
        own.append(piece)
    assert told[:, prompt.shape[1] :].tolist() == torch.cat(own, dim=1).tolist()


def tensor_types(folder: Path) -> dict[str, torch.dtype]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a mapping


GDN = "g: {kind: gated_deltanet, head_dim: 16, expand: 1/2, expand_v: 3/2, value_groups: 2, conv: 3}"
GATED = "a: {kind: attention, head_dim: 16, kv_groups: all, rope_fraction: 1/2, qk_norm: true, gate: element}"
LOCAL = "l: {kind: attention, head_dim: 32, kv_groups: 2, window: 9, rope_theta: 777, qk_norm: true}"
GLOBAL = "g: {kind: attention, head_dim: 32, kv_groups: 2, qk_norm: true}"
FREE = "a: {kind: attention, head_dim: 16, kv_groups: 2}"
NARROW = "w: {kind: attention, head_dim: 32, window: 9, rope_theta: 50000}"
DELTA = "t: {kind: deltanet, head_dim: 16, expand: 1/2, conv: 3, gate: true, neg_eigenvalues: true}"
RETNET = "r: {kind: scalar_decay, variant: retnet, head_dim: 16, expand_v: 3/2}"
SIZES = "head_dim: 16, expand: 1/2"
SCALED = "tie_embeddings: false, residual: scaled"
SANDWICH = "norm_place: sandwich, residual: scaled"
