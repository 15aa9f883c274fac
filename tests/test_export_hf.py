"""Exported folders for transformers: loaded where nothing of ours exists, they do what users do with a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bare_process import ALONE, run_bare
from export_models import CONV, MODELS, drawn, few_experts, ffn, model, prompt, spaces

from archsearch import cost
from archsearch.architecture import Block, ModelSpec
from archsearch.export import export_model
from archsearch.export.code import has_biases
from archsearch.export.hf.code import modeling_code
from archsearch.model import build_model
from archsearch_kernels.dispatch import using

# What users do; every line of `found` is one way of using the folder and must come to the same.
USE = (
    ALONE
    + """
import sys, tempfile
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
WAYS = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True, "top_k": 20},
    "chunked": {"do_sample": False, "prefill_chunk_size": 16},
}
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    tokens = torch.load(folder / "tokens.pt")
    found = {"n_params": sum(p.numel() for p in model.parameters())}
    with torch.no_grad():
        found["logits"] = model(tokens, use_cache=False).logits
        found["logits_cached"] = model(tokens).logits
        first = model(tokens[:, :21])
        pieces, cache = [first.logits], first.past_key_values
        pieces += [model(t, past_key_values=cache).logits for t in tokens[:, 21:].split(7, dim=1)]
        found["logits_in_pieces"] = torch.cat(pieces, dim=1)
        found["logits_to_keep"] = model(tokens, logits_to_keep=2).logits
        found["hidden"] = len(model(tokens, output_hidden_states=True).hidden_states)
        found["embeds"] = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits

        class Streamer:
            def __init__(self):
                self.tokens, self.ended = [], False
            def put(self, value):
                self.tokens += value.flatten().tolist()
            def end(self):
                self.ended = True

        def generate(tokens, mask, way, use_cache, **more):
            torch.manual_seed(1)
            return model.generate(
                tokens, attention_mask=mask, use_cache=use_cache, max_new_tokens=5, eos_token_id=None, pad_token_id=0,
                **WAYS[way], **more
            )

        one, two = tokens[:1, :40], tokens[1:, :31]
        both = torch.cat([one, torch.cat([torch.zeros(1, 9, dtype=torch.long), two], dim=1)])
        mask = torch.ones_like(both)
        mask[1, :9] = 0
        streamer = Streamer()
        for way, texts, padded in (  # each text alone, then both side by side: with a cache, without
            ("greedy", (one, two), (True, False)),
            ("beam", (one, two), (True,)),
            ("sample", (two,), ()),
            ("chunked", (one, two), (True,)),
        ):
            for i, text in enumerate(texts):
                told = {"streamer": streamer} if (way, i) == ("greedy", 0) else {}
                found[f"{way} {i} True"] = generate(text, torch.ones_like(text), way, True, **told)
                if way != "chunked":
                    found[f"{way} {i} False"] = generate(text, torch.ones_like(text), way, False)
            for use_cache in padded:
                alone = [found[f"{way} {i} True"][:, text.shape[1]:] for i, text in enumerate(texts)]
                out = generate(both, mask, way, use_cache)
                found[f"{way} padded {use_cache}"] = torch.equal(out[:, 40:], torch.cat(alone))
        found["stream"] = streamer.ended and streamer.tokens == found["greedy 0 False"][0].tolist()

        documents = torch.cat([tokens[:1, :40], tokens[1:, :31]], dim=1)
        number = torch.tensor([[0] * 40 + [1] * 31])
        position = torch.tensor([[*range(40), *range(31)]])
        found["packed"] = model(documents, seq_idx=number, use_cache=False).logits
        found["packed by position"] = model(documents, position_ids=position, use_cache=False).logits
        found["apart"] = torch.cat([model(one).logits, model(two).logits], dim=1)

        with tempfile.TemporaryDirectory() as again:
            model.save_pretrained(again)
            found["files again"] = sorted(p.name for p in Path(again).iterdir())
            loaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, device_map="cpu").eval()
            found["again"] = all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        found["tied"] = (model.lm_head.weight is model.model.embed_tokens.weight, config.tie_word_embeddings)
        made = AutoModel.from_config(config, trust_remote_code=True)
        found["fresh"] = {name: (float(p.mean()), float(p.std())) for name, p in made.named_parameters()}
        half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        found["half"] = half(tokens).logits.dtype == torch.bfloat16 == half.dtype
    grads = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        found[f"loss {checkpointing}"] = float(loss)
    found["grads"] = max(float((a - grads[1][n]).abs().max() / a.abs().max()) for n, a in grads[0].items())
    torch.save(found, folder / "found.pt")
strangers = [name for name in sys.modules if name.split(".")[0] in ("archsearch", "archsearch_kernels")]
assert not strangers, strangers
"""
)


@pytest.fixture(scope="module", autouse=True)
def plain_torch() -> Iterator[None]:
    """Exported code is plain torch; so is what it is compared with."""
    with using("reference"):
        yield


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that a test compares itself need not be compared at length before."""
    monkeypatch.setattr("archsearch.export.hf.parity.GREEDY", 8)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("few_steps")
def test_used_where_nothing_of_ours_is(tmp_path: Path) -> None:
    """Every model exported with random weights, then used in one bare process."""
    out = {}
    for number, (name, spec) in enumerate(MODELS.items()):
        weights = build_model(spec, seed=7).state_dict()
        out[name] = export_model(spec, tmp_path / f"m{number}", weights=weights, name=f"m{number}", format="hf")
        torch.save(prompt(spec), out[name] / "tokens.pt")
    (tmp_path / "cache").mkdir()
    run_bare(USE, *out.values(), cache=tmp_path / "cache")
    for name, folder in out.items():
        check_use(MODELS[name], folder)


@torch.no_grad()
def check_use(spec: ModelSpec, folder: Path) -> None:
    """What came of USE, against the search model and against itself."""
    search, tokens = build_model(spec, seed=7).eval(), prompt(spec)
    found = torch.load(folder / "found.pt")
    logits = search(tokens)
    scale = float(logits.abs().max())

    def same(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
        torch.testing.assert_close(one, other, atol=tolerance * scale, rtol=0)

    same(found["logits"], logits, 1e-5)
    for way in ("logits_cached", "logits_in_pieces", "embeds"):
        same(found[way], logits, 1e-4)
    same(found["logits_to_keep"], logits[:, -2:], 1e-4)
    assert found["n_params"] == cost.params(spec)
    assert found["hidden"] == spec.n_blocks + 1
    for way, i in (("greedy", 0), ("greedy", 1), ("beam", 0), ("beam", 1), ("sample", 0)):
        assert torch.equal(found[f"{way} {i} True"], found[f"{way} {i} False"]), way
    for i in (0, 1):
        assert torch.equal(found[f"chunked {i} True"], found[f"greedy {i} True"])
    assert found["greedy padded True"]
    assert found["greedy padded False"]
    assert found["beam padded True"]
    assert found["chunked padded True"]
    assert found["stream"]
    same(found["packed"], found["apart"], 1e-4)
    assert torch.equal(found["packed"], found["packed by position"])
    assert found["again"]
    code = {f"{part}_{folder.name}.py" for part in ("modeling", "configuration")}
    assert {*code, "config.json", "model.safetensors"} <= set(found["files again"])
    assert found["tied"] == (spec.trunk.tie_embeddings,) * 2
    assert found["half"]
    assert found["loss True"] == pytest.approx(found["loss False"], rel=1e-5)
    assert found["grads"] < 1e-3
    fresh = dict(build_model(spec, seed=3).named_parameters())
    for parameter_name, (mean, std) in found["fresh"].items():
        theirs = fresh[parameter_name.replace("embed_tokens", "embed").replace("layers.", "blocks.")]
        n = theirs.numel()
        expected, spread = float(theirs.mean()), float(theirs.std()) if n > 1 else 1.0
        assert mean == pytest.approx(expected, abs=8 * spread / n**0.5 + 1e-3), parameter_name
        if n > 4000:
            assert std == pytest.approx(spread, rel=10 / n**0.5), parameter_name


def test_shared_weights_leave_no_option_of_the_block() -> None:
    code = modeling_code(MODELS["shared weights"], "exported")
    assert "def share(self" in code
    for word in ("norm_place", "make_norm", "Identity", "residual_scale", "shares_kv", "delattr"):
        assert word not in code, word


def test_a_router_asks_its_kernel_for_what_is_not_the_default() -> None:
    experts = {"kind": "moe", "n_experts": 4, "top_k": 2}
    code = modeling_code(model(Block(CONV, ffn(**experts))), "exported")
    assert "def route(logits: Tensor, top_k: int) -> " in code
    assert "        return kernels.route(logits, top_k)\n" in code
    code = modeling_code(model(Block(CONV, ffn(**experts, normalize=False))), "exported")
    assert "        return kernels.route(logits, top_k, normalize=False)\n" in code


def test_initial_values_for_what_the_model_has() -> None:
    plain, decay = (modeling_code(MODELS[name], "exported") for name in ("plain", "decay"))
    for word in ("LayerNorm", "module.bias", "reset_parameters"):
        assert word not in plain, word
        assert word in decay, word


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nn.Linear(3, f(4), bias=False)\nisinstance(m, nn.Linear)", False),
        ("nn.Linear(\n    3,\n    4,\n    bias=False,\n)", False),
        ("nn.Linear(3, 4)", True),
        ("nn.Linear(3, 4, bias=b)", True),
        ("Linear(3, 4, bias=False), nn.LazyLinear(4)", True),
        ("class Mine(nn.Linear):\n    pass", True),
        ("make = nn.Linear", True),
    ],
)
def test_biases_are_found(text: str, expected: bool) -> None:
    assert has_biases(text) == expected


LOAD = (
    ALONE
    + """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.load(folder / "tokens.pt")
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens[1:, :-5]], dim=1)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    ways = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        out = {"logits": model(tokens, use_cache=False).logits, "cached": model(tokens).logits}
        both = model.generate(torch.cat([tokens[:1], padded]), attention_mask=mask, **ways)
        for row, text in ((0, tokens[:1]), (1, tokens[1:, :-5])):
            alone = model.generate(text, attention_mask=torch.ones_like(text), **ways)
            out[f"padded {row}"] = torch.equal(both[row, -4:], alone[0, -4:])
    torch.save(out, folder / "out.pt")
assert not [name for name in sys.modules if name.split(".")[0] in ("archsearch", "archsearch_kernels")]
"""
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("few_steps")
@torch.no_grad()
def test_draws_from_every_shipped_space(tmp_path: Path) -> None:
    """Sampled, built, exported, loaded in a bare process, compared; as deep as the layout needs to repeat."""
    specs = {name: few_experts(drawn(name, seed)) for seed, name in enumerate(spaces())}
    out = {}
    for number, (name, spec) in enumerate(specs.items()):
        weights = build_model(spec, seed=7).state_dict()
        out[name] = export_model(spec, tmp_path / f"d{number}", weights=weights, name=f"d{number}", format="hf")
        torch.save(prompt(spec, 70), out[name] / "tokens.pt")
    (tmp_path / "cache").mkdir()
    run_bare(LOAD, *out.values(), cache=tmp_path / "cache")
    for name, spec in specs.items():
        logits = build_model(spec, seed=7).eval()(prompt(spec, 70))
        found, scale = torch.load(out[name] / "out.pt"), float(logits.abs().max())
        torch.testing.assert_close(found["logits"], logits, atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(found["cached"], logits, atol=1e-4 * scale, rtol=0)
        assert found["padded 0"], name
        assert found["padded 1"], name
