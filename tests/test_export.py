"""Exported models: on their own, for every kind and every layout, they compute what the search model computes."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from export_models import (
    CONTEXT,
    CONV,
    DENSE,
    FULL,
    MODELS,
    WINDOW,
    drawn,
    ffn,
    load,
    mixer,
    model,
    of_kind,
    prompt,
    space,
    spaces,
    token_by_token,
)
from test_contract import MIXER_VARIANTS

from archsearch import cost
from archsearch.architecture import Block, ModelSpec
from archsearch.choosers import RandomChooser
from archsearch.export import code as code_module
from archsearch.export import export_model
from archsearch.export.blocks import Classes, condition, make_blocks_source
from archsearch.export.code import model_code
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.model import build_model, num_params

# What the exported folder does where nothing of this project can be imported.
BARE = """
import sys
from pathlib import Path

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("archsearch", "archsearch_kernels"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Nothing())
import torch

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    sys.path.insert(0, str(folder))
    import model

    assert Path(model.__file__).parent == folder
    made = model.HybridLM.from_pretrained(folder)
    tokens = torch.load(folder / "tokens.pt")
    with torch.no_grad():
        out = {"full": made(tokens), "n_params": sum(p.numel() for p in made.parameters())}
        state = made.init_state(2, tokens.shape[1])
        pieces = [made.extend(tokens[:, :21], state)]
        pieces += [made.extend(tokens[:, t : t + 1], state) for t in range(21, tokens.shape[1])]
        out["steps"] = torch.cat(pieces, dim=1)
        out["greedy"] = made.generate(tokens[:, :30], 20)
    torch.save(out, folder / "out.pt")
    del sys.modules["model"], sys.path[0]
strangers = [name for name in sys.modules if name.split(".")[0] in ("archsearch", "archsearch_kernels")]
assert not strangers, strangers
"""


@pytest.fixture(scope="module", autouse=True)
def specialised_once() -> Iterator[None]:
    """A layout that several tests export has the same text before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_module, "specialised", cache(code_module.specialised))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model exported with random weights, then run in one bare process."""
    root = tmp_path_factory.mktemp("exports")
    out = {}
    for number, (name, spec) in enumerate(MODELS.items()):
        weights = build_model(spec, seed=7).state_dict()
        out[name] = export_model(spec, root / str(number), weights=weights, name="exported", provenance={})
        torch.save(prompt(spec), out[name] / "tokens.pt")
    command = [sys.executable, "-I", "-B", "-c", BARE, *map(str, out.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_kind_is_among_the_models() -> None:
    blocks = [block for spec in MODELS.values() for block in spec.blocks]
    assert {b.mixer.kind for b in blocks} == set(MIXERS.table)
    assert {b.ffn.kind for b in blocks} == set(FFNS.table)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_alone_it_computes_the_same(folders: dict[str, Path], name: str) -> None:
    spec = MODELS[name]
    search, found, tokens = build_model(spec, seed=7).eval(), torch.load(folders[name] / "out.pt"), prompt(spec)
    scale = float(search(tokens).abs().max())
    torch.testing.assert_close(found["full"], search(tokens), atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(found["steps"], token_by_token(search, tokens, 21), atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(found["steps"], found["full"], atol=1e-4 * scale, rtol=0)
    assert found["n_params"] == num_params(search) == cost.params(spec)
    greedy = tokens[:, :30]
    state = search.init_state(2, 50)
    logits = search.extend(greedy, state)
    for _ in range(20):
        greedy = torch.cat([greedy, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        logits = search.extend(greedy[:, -1:], state)
    assert torch.equal(found["greedy"], greedy)


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_the_same(folders: dict[str, Path], name: str) -> None:
    """Loss and gradients in training mode, the routers' included."""
    spec = MODELS[name]
    search, exported = build_model(spec, seed=7), load(folders[name] / "model.py").HybridLM()
    exported.load_state_dict(search.state_dict())
    tokens, losses = prompt(spec, 40), []
    for one in (search, exported):
        loss = one(tokens).float().logsumexp(-1).mean()
        extra = [m.router_loss for m in one.modules() if getattr(m, "router_loss", None) is not None]
        if one is exported and extra:
            assert one.balance_loss() == sum(extra)
        losses.append(loss + sum(extra))
        losses[-1].backward()
    assert torch.equal(*losses)
    ours = dict(exported.named_parameters())
    for parameter_name, parameter in search.named_parameters():
        assert parameter.grad is not None, parameter_name
        torch.testing.assert_close(ours[parameter_name].grad, parameter.grad)
    assert hasattr(exported, "balance_loss") == any(m == "softmax" for m in _routings(spec))
    assert hasattr(exported, "update_router_bias") == any(m == "sigmoid" for m in _routings(spec))
    if "sigmoid" in _routings(spec):
        for module in search.modules():
            if hasattr(module, "update_bias"):
                module.update_bias()
        exported.update_router_bias()
        for buffer_name, buffer in search.named_buffers():
            assert torch.equal(exported.get_buffer(buffer_name), buffer)


def _routings(spec: ModelSpec) -> list[str]:
    return [getattr(b.ffn, "routing", "") for b in spec.blocks]


@pytest.mark.parametrize("name", MODELS)
def test_fresh_weights_are_those_of_the_search(folders: dict[str, Path], name: str) -> None:
    search = build_model(MODELS[name], seed=5)
    exported = load(folders[name] / "model.py").HybridLM()
    torch.manual_seed(5)
    exported.init_weights()
    for parameter_name, tensor in search.state_dict().items():
        assert torch.equal(exported.state_dict()[parameter_name], tensor), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_the_code_reads_well(folders: dict[str, Path], name: str) -> None:
    path = folders[name] / "model.py"
    code = path.read_text()
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["check"], ["format", "--check"]):
        command = [*ruff, *check, "--isolated", "--line-length", "120", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    own = [line for line in code.splitlines() if "archsearch" in line and "runs the Triton" not in line]
    assert all(line.startswith("        from archsearch_kernels.") for line in own), own  # in `try`
    assert "seq_idx" not in code
    imported = set(re.findall(r"(?m)^\s*(?:from|import) (\w+)", code))
    assert imported - {"torch", "safetensors", "archsearch_kernels"} <= set(sys.stdlib_module_names)


def test_a_hybrid_of_three_mixers_has_less_than_800_lines() -> None:
    spec = space("qwen3-next").sample(RandomChooser(0)).architecture.at("proxy")
    assert len(model_code(spec, "bytes", "installed").splitlines()) < 800


def test_only_what_the_model_uses_is_there() -> None:
    code = model_code(MODELS["plain"])
    for word in (
        "window",
        "sink",
        "gate: str",
        "qk_norm",
        "reads_kv",
        "kv_from",
        "LayerNorm(",
        "LOGIT_SCALE",
        "norm_place",
    ):
        assert word not in code, word
    assert code.count("class ") == 6  # RMSNorm, Attention, SwiGLU, Block, State, HybridLM


RETNET = mixer("scalar_decay", variant="retnet", head_dim=16)
NO_POSITIONS = mixer("mla", head_dim=16, rope_dim=0)
EXPERTS = {"kind": "moe", "n_experts": 4}
PAIR = [{"kind": "attention", "head_dim": 16}, {"kind": "short_conv"}]
FOLDED = {  # blocks, the definition to look at, what must be in it, what must not
    "a decay without a convolution": (
        [Block(RETNET, DENSE), Block(NO_POSITIONS, DENSE)],
        "ScalarDecay",
        ("2^(-5 - h)",),
        ("taps", "conv", "state.get", "dim() == 1", "MiniMax", "layer_idx", "slope", "|    ", "simple_gla"),
    ),
    "latents without positions": (
        [Block(RETNET, DENSE), Block(NO_POSITIONS, DENSE)],
        "MLA",
        ("self.k_up(kv)",),
        ("rope_theta", "k_rope", "apply_rope", "otated", "q = x", "split(", "cat(", "[:, :, 0]", "R >"),
    ),
    "gates behind a norm": (
        [Block(RETNET, DENSE), Block(NO_POSITIONS, DENSE)],
        "gated_rms_norm",
        ('"""RMSNorm with a gate, ',),
        ("norm_before_gate", "act", "sigmoid", "groups", "flatten"),
    ),
    "weights divided once": (
        [Block(CONV, ffn(**EXPERTS, top_k=2, routing="sigmoid", norm_eps=1e-6))] * 2,
        "route",
        ("total + norm_eps",),
        ("normalize", "clamp", "softmax", "k > 1", "None"),
    ),
    "experts by sigmoids": (
        [Block(CONV, ffn(**EXPERTS, top_k=2, routing="sigmoid", norm_eps=1e-6))] * 2,
        "MoE",
        ("self.bias", "self.load"),
        ("keepdim", "_scores", "shared", "router_loss", "bias = "),
    ),
    "experts by a softmax": (
        [Block(FULL, ffn(**EXPERTS, top_k=1))] * 2,
        "MoE",
        ("router_loss",),
        ("bias:", "bias ", "load", "shared", "sigmoid"),
    ),
    "a single expert's weight": (
        [Block(FULL, ffn(**EXPERTS, top_k=1))] * 2,
        "route",
        ("topk",),
        ("sum", "k > 1", "normalize", "sigmoid"),
    ),
    "two ways of fusing": (
        [Block(mixer("parallel", of=PAIR, fuse=fuse), DENSE) for fuse in ("concat", "mean_norm")],
        "Parallel",
        (".mean(0)", "torch.cat("),
        (".sum(0)", '"sum"'),
    ),
    "windows without sinks": ([Block(WINDOW, DENSE)] * 2, "_banded", ("pairs_of_blocks(k)",), ("both", "sink")),
    "chosen blocks": (
        [Block(mixer("moba", head_dim=16, block_size=16, top_k=2), DENSE), Block(mixer("mamba"), DENSE)],
        "block_sparse_attention",
        ("means [B, N, G, D]",),
        ("at hand", "None: computed"),
    ),
    "chunks as long as fits": (
        [Block(mixer("moba", head_dim=16, block_size=16, top_k=2), DENSE), Block(mixer("mamba"), DENSE)],
        "selective_scan",
        ("CACHE",),
        ("None: 8", "in tokens"),
    ),
    "the norm": ([Block(WINDOW, DENSE)] * 2, "RMSNorm", ("self.eps",), ("or 0.0",)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_of_an_option_only_its_value_is_left(case: str) -> None:
    blocks, name, needed, gone = FOLDED[case]
    code = code_module.model_code(model(*blocks))
    found = re.search(rf"(?ms)^(?:def|class) {name}\b.*?(?=^\S(?!\s*->))", code)
    assert found is not None
    text = found[0]
    assert [word for word in needed if word not in text] == []
    assert [word for word in gone if word in text] == []


KINDS = [pytest.param(kind, i, id=f"{kind}-{i}") for kind, found in MIXER_VARIANTS.items() for i in range(len(found))]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), KINDS)
def test_each_variant_alone(kind: str, number: int, tmp_path: Path) -> None:
    """Where a kind is used in one way only, everything else of it is folded away; export_model compares."""
    spec = of_kind(kind, number)
    export_model(spec, tmp_path / "out", name="exported")


DRAWS = [(name, seed) for name in spaces() for seed in range(3 if name == "quickstart" else 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), DRAWS)
def test_draws_from_the_shipped_spaces(name: str, seed: int, tmp_path: Path) -> None:
    export_model(drawn(name, seed), tmp_path / "out", name="exported")


def test_a_large_model_is_compared_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archsearch.export import parity

    monkeypatch.setattr(parity, "SMALL", 0)
    for i, name in enumerate(("shared keys and values", "sparse", "only experts")):
        spec = replace(MODELS[name], dtype="bfloat16")
        export_model(spec, tmp_path / str(i), weights="init", name="exported")
        assert "blocks at full width" in (tmp_path / str(i) / "README.md").read_text()


def test_a_block_too_large_to_make_is_compared_by_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archsearch.export import parity

    monkeypatch.setattr(parity, "SMALL", 0)
    monkeypatch.setattr(parity, "LARGE_BLOCK", 150_000)
    spec = model(Block(CONV, DENSE), Block(CONV, ffn("swiglu", expand=4)))
    export_model(spec, tmp_path / "out", name="exported")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "outputs of 1 blocks at full width (1 other kinds of block are too large" in readme


@pytest.mark.parametrize("whole", [True, False])
def test_code_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    from archsearch.errors import ExportError
    from archsearch.export import code, parity

    monkeypatch.setattr(parity, "SMALL", 10**9 if whole else 0)
    right = code.model_code
    monkeypatch.setattr(code, "model_code", lambda *a: right(*a).replace("a * cos - b * sin", "a * cos + b * sin"))
    with pytest.raises(ExportError, match="differs from the search model"):
        export_model(MODELS["plain"], tmp_path / "out", name="exported")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        code, "model_code", lambda *a: right(*a).replace("bias=False)\n        self.o", "bias=True)\n        self.o")
    )
    with pytest.raises(ExportError, match=r"other tensors than the search model: blocks\.0\.mixer\.v_proj\.bias"):
        export_model(MODELS["plain"], tmp_path / "out", name="exported")
    assert not list(tmp_path.iterdir())


def test_a_third_partys_mixer(tmp_path: Path) -> None:
    from example_plugin.spec import Average

    spec = model(Block(Average(), DENSE), Block(FULL, DENSE), Block(Average(), DENSE))
    monkey = tmp_path / "out"
    export_model(spec, monkey, weights="init", name="exported")
    code = (monkey / "model.py").read_text()
    assert "class Average(nn.Module):" in code
    assert "flaw" not in code
    assert "example_plugin" not in code


@pytest.mark.slow
def test_the_same_text_whatever_the_hash_seed() -> None:
    """That of this process is another one."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from export_models import MODELS; "
        "from archsearch.export.code import model_code; print(model_code(MODELS['shared weights']))"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
    assert text.rstrip("\n") == model_code(MODELS["shared weights"]).rstrip("\n") != ""


def test_conditions_hold_where_they_should() -> None:
    rng = random.Random(0)
    for _ in range(500):
        n = rng.randrange(2, 30)
        members = set(rng.sample(range(n), rng.randrange(1, n)))
        others = {i for i in range(n) if i not in members and rng.random() < 0.8}
        text = condition(members, set(others), n)
        assert all(eval(text, {"i": i}) for i in members), text
        assert not any(eval(text, {"i": i}) for i in others), text
    assert condition({3, 7, 11}, set(range(12)) - {3, 7, 11}, 12) == "i % 4 == 3"
    assert condition({0, 1}, {2, 3}, 4) == "i < 2"
    assert condition({0, 5, 7}, {1, 2, 3, 4, 6}, 8) == "i in (0, 5, 7)"


def test_layouts_as_a_person_would_write_them() -> None:
    a, b = Block(CONV, DENSE), Block(FULL, DENSE)
    source = make_blocks_source(model(a, a, a, b, a, a, a, b), Classes())
    assert (
        "        if i % 4 == 3:\n            mixer = Attention(D_MODEL, n_heads=8, n_kv_heads=4, head_dim=16" in source
    )
    assert "        else:\n            mixer = ShortConv(D_MODEL)\n" in source
    assert "        ffn = SwiGLU(D_MODEL, d_hidden=128)\n" in source
    source = make_blocks_source(MODELS["shared weights"], Classes())
    assert "    for i in (2, 5):\n        blocks[i].mixer = blocks[1].mixer  # the same weights\n" in source
    lightning = [Block(MODELS["decay"].blocks[3].mixer, DENSE)] * 4
    assert "layer_idx=i, n_layers=N_BLOCKS" in make_blocks_source(model(*lightning), Classes())


def test_the_folder(folders: dict[str, Path]) -> None:
    folder, spec = folders["plain"], MODELS["plain"]
    made = {path.name for path in folder.iterdir()} - {"tokens.pt", "out.pt"}
    assert made == {"model.py", "config.json", "model.safetensors", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert ModelSpec.from_json(config["model"]) == spec
    assert config["n_params"] == cost.params(spec)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "embed.weight" not in names or "head.weight" not in names  # tied: kept once
    assert len(names) == len(build_model(spec).state_dict()) - 1


def test_bf16_weights_come_back_as_they_were(tmp_path: Path) -> None:
    spec = model(Block(FULL, DENSE), Block(MODELS["decay"].blocks[0].mixer, DENSE), dtype="bfloat16")
    weights = build_model(spec, seed=1, dtype=torch.bfloat16)
    export_model(spec, tmp_path / "out", weights=weights.state_dict(), name="exported")
    made = load(tmp_path / "out" / "model.py").HybridLM.from_pretrained(tmp_path / "out")
    assert made.embed.weight.dtype == torch.bfloat16
    assert all(torch.equal(made.state_dict()[k], t) for k, t in weights.state_dict().items())
    assert torch.equal(made(prompt(spec)), weights.eval()(prompt(spec)))


def test_generation(folders: dict[str, Path]) -> None:
    made = load(folders["shared weights"] / "model.py").HybridLM.from_pretrained(folders["shared weights"])
    tokens = prompt(MODELS["shared weights"], 12)
    torch.manual_seed(0)
    one = made.generate(tokens, 5, temperature=1.0)
    assert one.shape == (2, 17)
    assert torch.equal(one[:, :12], tokens)
    torch.manual_seed(0)
    assert torch.equal(made.generate(tokens, 5, temperature=1.0), one)
    greedy = made.generate(tokens, 5)
    assert torch.equal(made.generate(tokens, 5, temperature=0.5, top_k=1), greedy)
    assert torch.equal(made.generate(tokens, 0), tokens)


def test_context_is_long_enough_for_every_path() -> None:
    """Windows wrap round and chunks are crossed."""
    assert CONTEXT > 64
    assert any(getattr(b.mixer, "window", None) and b.mixer.window * 2 < CONTEXT for b in MODELS["attention"].blocks)  # type: ignore[attr-defined]
