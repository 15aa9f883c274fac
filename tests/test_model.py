"""The language model: trunk options, edges across depth, initialisation, width rules and decoding."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from spaces import TINY
from torch import Tensor, nn

from archsearch import cost
from archsearch.architecture import Block, ModelSpec, Trunk
from archsearch.choosers import RandomChooser
from archsearch.errors import GraphError
from archsearch.ffns.moe import MoE
from archsearch.ffns.none import NoFFN
from archsearch.ffns.swiglu import SwiGLU
from archsearch.mixers.attention import Attention
from archsearch.mixers.gla import GLA
from archsearch.mixers.mamba2 import Mamba2
from archsearch.mixers.none import NoMixer
from archsearch.mixers.short_conv import ShortConv
from archsearch.model import (
    BASE_WIDTH,
    EMBED_STD,
    HybridLM,
    build_model,
    hidden_matrices,
    init_weights,
    num_params,
    width_multipliers,
)
from archsearch.space import SearchSpace
from archsearch.testing.checks import EQUAL, EXACT, distance, is_near, packed, pieces, poisoned_memory, seeded

VOCAB = 50
FULL, WINDOW = Attention(head_dim=16), Attention(head_dim=16, window=8)
DENSE = SwiGLU(expand=2)
TRUNKS = [
    Trunk(norm=norm, norm_place=place, tie_embeddings=tie, residual=residual)
    for (norm, place), (tie, residual) in zip(
        itertools.product(("rmsnorm", "layernorm"), ("pre", "post", "sandwich")),
        itertools.cycle([(True, "plain"), (False, "scaled"), (False, "plain"), (True, "scaled")]),
        strict=False,
    )
]
NAMES = [f"{trunk.norm}-{trunk.norm_place}" for trunk in TRUNKS]


def model_spec(*blocks: Block, d_model: int = 64, **changes: Any) -> ModelSpec:
    return ModelSpec(d_model, 96, VOCAB, blocks, **changes)


def hybrid(**changes: Any) -> ModelSpec:
    """One of everything that differs in kind: full and windowed attention, recurrences, a convolution, experts."""
    return model_spec(
        Block(GLA(head_dim=16), DENSE),
        Block(WINDOW, MoE(n_experts=4, expand=0.5)),
        Block(Mamba2(head_dim=16, d_state=16), NoFFN()),
        Block(NoMixer(), DENSE),
        Block(ShortConv(), DENSE),
        Block(FULL, DENSE),
        **changes,
    )


def noisy(spec: ModelSpec, seed: int = 0) -> HybridLM:
    """A model whose parameters are all different from 0, the untied head's too."""
    model = build_model(spec, seed)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.02 * seeded(*parameter.shape, seed=i)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def extend(model: HybridLM, text: Tensor, split: list[int]) -> Tensor:
    """Logits of the text fed in pieces."""
    state = model.init_state(text.shape[0], text.shape[1])
    return torch.cat([model.extend(piece, state) for piece in text.split(split, dim=1)], dim=1)


def assert_decodes(model: HybridLM, length: int = 90) -> None:
    """One pass == one extend == pieces == token by token."""
    text = tokens(2, length)
    with torch.no_grad():
        whole = model(text)
        for split in ([length], pieces(length, 0), [1] * length):
            assert distance(extend(model, text, split), whole) <= EQUAL, split


@pytest.mark.parametrize("trunk", TRUNKS, ids=NAMES)
def test_trunks(trunk: Trunk) -> None:
    spec = model_spec(Block(GLA(head_dim=16), DENSE), Block(WINDOW, NoFFN()), Block(NoMixer(), DENSE), trunk=trunk)
    model = noisy(spec)
    assert model(tokens(2, 7)).shape == (2, 7, VOCAB)
    assert num_params(model) == cost.params(spec)
    assert (model.head.weight is model.embed.weight) == trunk.tie_embeddings
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm if trunk.norm == "rmsnorm" else nn.LayerNorm)]
    own = 1 if trunk.norm == "rmsnorm" else 0  # GLA norms its heads
    assert len(norms) == 1 + own + 4 * (2 if trunk.norm_place == "sandwich" else 1)
    assert_decodes(model, 20)


def test_norm_places() -> None:
    """Each place computed by hand from the block's own parts."""
    x = seeded(1, 5, 64)
    for place in ("pre", "post", "sandwich"):
        for residual, scale in (("plain", 1.0), ("scaled", 2**-0.5)):
            spec = model_spec(Block(FULL, DENSE), trunk=Trunk(norm_place=place, residual=residual))
            block: Any = noisy(spec).blocks[0]
            h = block.mixer_norm(x) if place != "post" else x
            y = block.mixer(h)
            middle = x + scale * (block.mixer_post_norm(y) if place != "pre" else y)
            h = block.ffn_norm(middle) if place != "post" else middle
            y = block.ffn(h)
            end = middle + scale * (block.ffn_post_norm(y) if place != "pre" else y)
            assert distance(block(x)[0], end) <= EXACT


def test_hybrid_decodes() -> None:
    assert_decodes(noisy(hybrid()))


def test_hybrid_is_causal() -> None:
    """The gate every architecture has to pass before it is trained: no logit moves when a later token does."""
    model = noisy(hybrid())
    cuts = (0, 15, 16, 63, 64, 78)
    text = tokens(1, 80).repeat(len(cuts), 1)
    with torch.no_grad():
        before = model(text)
        for row, t in enumerate(cuts):
            text[row, t + 1 :] = (text[row, t + 1 :] + 1) % VOCAB
        after = model(text)
    for row, t in enumerate(cuts):
        assert distance(after[row, : t + 1], before[row, : t + 1]) <= EXACT, f"token {t} sees what follows"
        assert distance(after[row, t + 1], before[row, t + 1]) > EQUAL


@pytest.mark.parametrize("kv_from", [None, 0])
def test_documents_are_isolated(kv_from: int | None) -> None:
    spec = hybrid()
    if kv_from is not None:
        spec = model_spec(Block(FULL, DENSE), *spec.blocks[1:5], Block(FULL, DENSE, kv_from=0))
    model = noisy(spec)
    lengths = (17, 1, 46, 26)
    seq_idx = packed([lengths])
    text = tokens(1, 90)
    with torch.no_grad():
        logits = model(text, seq_idx)
        alone = torch.cat([model(document) for document in text.split(lengths, dim=1)], dim=1)
        assert distance(logits, alone) <= EQUAL
        for i in range(len(lengths)):
            own = seq_idx == i
            changed = model(torch.where(own, (text + 1) % VOCAB, text), seq_idx)
            assert distance(changed[~own], logits[~own]) <= EXACT


def test_last_only_gives_the_last_logits() -> None:
    model, text = noisy(hybrid()), tokens(2, 30)
    state, other = model.init_state(2, 40), model.init_state(2, 40)
    with torch.no_grad():
        last = model.extend(text, state, last_only=True)
        whole = model.extend(text, other)
    assert last.shape == (2, 1, VOCAB)
    assert distance(last, whole[:, -1:]) <= EXACT
    assert state.position == other.position == 30


KV_EDGES = {
    "cross-layer attention in pairs": [(FULL, None), (FULL, 0), (FULL, None), (FULL, 2)],
    "one cache for the upper half": [(ShortConv(), None), (FULL, None), (FULL, 1), (FULL, 1)],
    "a window on a full cache": [(FULL, None), (WINDOW, 0)],
    "a window on an equal one": [(WINDOW, None), (WINDOW, 0)],
    "a window on a wider one": [(Attention(head_dim=16, window=24), None), (ShortConv(), None), (WINDOW, 0)],
    "grouped and normed": [(Attention(head_dim=16, kv_groups=2, qk_norm=True), at) for at in (None, 0)],
}


@pytest.mark.parametrize("edges", KV_EDGES)
def test_shared_keys_and_values(edges: str) -> None:
    blocks = [Block(mixer, DENSE, kv_from=source) for mixer, source in KV_EDGES[edges]]
    spec = model_spec(*blocks)
    model = noisy(spec)
    assert num_params(model) == cost.params(spec)
    state = model.init_state(3, 96)
    assert state.num_bytes() == cost.state_bytes(spec, batch=3)
    for block, held in zip(spec.blocks, state.blocks, strict=True):
        assert bool(held) == (block.kv_from is None)
    assert_decodes(model)


def test_a_reader_attends_to_the_sources_keys() -> None:
    model: Any = noisy(model_spec(Block(FULL, NoFFN()), Block(FULL, NoFFN(), kv_from=0)))
    source, reader = model.blocks[0].mixer, model.blocks[1].mixer
    assert not hasattr(reader, "k_proj")
    x, z = seeded(1, 9, 64), seeded(1, 9, 64, seed=1)
    expected = reader.attend(z, source.make_kv(x), 0, None)
    assert not torch.equal(expected, reader.attend(z, source.make_kv(z), 0, None))
    h = model.blocks[0].mixer_norm(x)
    _, kv = model.blocks[0](x)
    assert all(torch.equal(a, b) for a, b in zip(kv, source.make_kv(h), strict=True))


def test_shared_weights_are_one_module() -> None:
    spec = model_spec(
        Block(FULL, DENSE),
        Block(GLA(head_dim=16), DENSE, ffn_weights_from=0),
        Block(FULL, MoE(n_experts=4), mixer_weights_from=0),
        Block(FULL, DENSE, mixer_weights_from=2, ffn_weights_from=1),
    )
    model: Any = noisy(spec)
    assert model.blocks[3].mixer is model.blocks[2].mixer is model.blocks[0].mixer
    assert model.blocks[3].ffn is model.blocks[1].ffn is model.blocks[0].ffn
    assert num_params(model) == cost.params(spec)
    assert not any("blocks.3.mixer." in name or "blocks.3.ffn." in name for name, _ in model.named_parameters())
    state = model.init_state(1, 96)
    assert state.num_bytes() == cost.state_bytes(spec), "weights are shared, caches are not"
    assert_decodes(model)


def test_shared_weights_gather_all_gradients() -> None:
    shared = noisy(model_spec(Block(NoMixer(), DENSE), Block(NoMixer(), DENSE, ffn_weights_from=0)))
    twice = noisy(model_spec(Block(NoMixer(), DENSE), Block(NoMixer(), DENSE)))
    twice.load_state_dict(shared.state_dict())
    text = tokens(2, 9)
    assert torch.equal(shared(text), twice(text))
    for model in (shared, twice):
        model(text).square().sum().backward()  # type: ignore[no-untyped-call]
    blocks: Any = twice.blocks
    one: Any = shared.blocks[0]
    both = blocks[0].ffn.up_proj.weight.grad + blocks[1].ffn.up_proj.weight.grad
    assert distance(one.ffn.up_proj.weight.grad, both) <= EQUAL


def test_initialisation_is_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    with poisoned_memory():
        one = build_model(hybrid(), seed=3).state_dict()
    after = torch.rand(3)
    torch.manual_seed(2)
    two = build_model(hybrid(), seed=3).state_dict()
    other = build_model(hybrid(), seed=4).state_dict()
    assert all(value.isfinite().all() and torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after), "building leaves the caller's random state alone"


def test_initial_sizes() -> None:
    spec = model_spec(Block(FULL, MoE(n_experts=4)), Block(FULL, DENSE), d_model=256, trunk=Trunk(tie_embeddings=False))
    model: Any = build_model(spec)
    block, experts = model.blocks[1], model.blocks[0].ffn
    sizes = {
        "embed": (model.embed.weight, EMBED_STD),
        "head": (model.head.weight, EMBED_STD),
        "query": (block.mixer.q_proj.weight, 256**-0.5),
        "output": (block.mixer.o_proj.weight, 256**-0.5),
        "up": (block.ffn.up_proj.weight, 256**-0.5),
        "down": (block.ffn.down_proj.weight, 512**-0.5),
        "experts' up": (experts.up_proj, 256**-0.5),
        "experts' down": (experts.down_proj, experts.down_proj.shape[-1] ** -0.5),
    }
    for name, (weight, std) in sizes.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
    assert (model.norm.weight == 1).all()
    assert (model.embed(tokens(1, 90)) * model.embed_scale).std().item() == pytest.approx(1, rel=0.05)


def test_initialisation_in_place_is_the_same() -> None:
    """Built on meta and placed, or built here and filled again: one rule."""
    spec = hybrid()
    here = HybridLM(spec)
    init_weights(here, 5)
    placed = build_model(spec, seed=5)
    assert all(torch.equal(value, placed.state_dict()[name]) for name, value in here.state_dict().items())


def test_width_multipliers() -> None:
    spec = hybrid(d_model=128, trunk=Trunk(tie_embeddings=False))
    factors = width_multipliers(spec)
    model = build_model(spec)
    assert list(factors) == [name for name, _ in model.named_parameters()]
    assert set(factors.values()) == {1.0, BASE_WIDTH / 128}
    hidden = {name for name, factor in factors.items() if factor != 1.0}
    assert hidden == hidden_matrices(spec)
    assert {"blocks.5.mixer.q_proj.weight", "blocks.5.mixer.o_proj.weight", "blocks.1.ffn.up_proj"} <= hidden
    assert not {"embed.weight", "head.weight", "norm.weight", "blocks.0.mixer_norm.weight"} & hidden
    convolutions = [name for name, p in model.named_parameters() if "conv" in name and p.dim() > 1]
    assert convolutions
    assert not set(convolutions) & hidden, "taps do not grow with the width"


def test_logits_keep_their_size_at_any_width() -> None:
    sizes = []
    for width in (64, 256):
        model = build_model(model_spec(Block(FULL, DENSE), d_model=width, trunk=Trunk(tie_embeddings=False)))
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            # what training gives the head: a part along the activations, whose sum grows with the width
            model.head.weight.add_(model.norm(model.embed.weight * model.embed_scale))
            sizes.append(model(tokens(1, 90)).abs().max().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)


@pytest.mark.parametrize("trunk", TRUNKS, ids=NAMES)
def test_bfloat16_and_autocast(trunk: Trunk) -> None:
    """Without experts: where rounding tips a router over, the difference spreads to all later tokens."""
    blocks = [replace(block, ffn=DENSE) if block.ffn.kind == "moe" else block for block in hybrid().blocks]
    spec = model_spec(*blocks, trunk=trunk)
    text = tokens(2, 70)
    low, high = noisy(spec).bfloat16(), noisy(spec)
    high.load_state_dict(low.state_dict())
    with torch.no_grad():
        truth = high(text)
        assert low(text).dtype == torch.bfloat16
        assert is_near(low(text), truth)
        with torch.autocast("cpu", torch.bfloat16):
            assert is_near(high(text), truth)


def test_dtype_and_device_of_a_build() -> None:
    model = build_model(hybrid(), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    state = model.init_state(2, 96)
    assert state.num_bytes() == cost.state_bytes(hybrid(dtype="bfloat16"), batch=2)
    with torch.no_grad():
        assert model.extend(tokens(2, 9), state).isfinite().all()


def test_what_is_no_model_is_refused_before_any_tensor() -> None:
    with pytest.raises(GraphError, match="block 1 has neither a mixer nor an ffn"):
        HybridLM(model_spec(Block(FULL, DENSE), Block(NoMixer(), NoFFN())))


def test_arguments_of_the_wrong_size_are_explained() -> None:
    candidate = SearchSpace.from_text(TINY).sample(RandomChooser(0))
    with pytest.raises(ValueError, match=r"no scale 'prox'; expected one of proxy, target\. Did you mean 'proxy'"):
        candidate.architecture.at("prox")
    model = build_model(candidate.architecture.at("proxy"))
    with pytest.raises(ValueError, match=r"tokens have the shape \[5\]; expected \[batch, time\]"):
        model(torch.zeros(5, dtype=torch.long))
    state = model.init_state(1, 8)
    with pytest.raises(ValueError, match=r"tokens have the shape \[5\]"):
        model.extend(torch.zeros(5, dtype=torch.long), state)
    model.extend(torch.zeros(1, 6, dtype=torch.long), state)
    with pytest.raises(
        ValueError, match=r"3 more tokens after 6 do not fit a state of 8; write init_state\(batch, conte"
    ):
        model.extend(torch.zeros(1, 3, dtype=torch.long), state)
    assert state.position == 6, "nothing was touched"
    model.extend(torch.zeros(1, 2, dtype=torch.long), state)
