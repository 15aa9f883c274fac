"""The published hybrids: they load, resolve to the published placements, build on meta, and serve as baselines."""

from pathlib import Path

import pytest
import torch
from spaces import TINY

from archsearch import cost
from archsearch.architecture import ModelSpec
from archsearch.check import check_space
from archsearch.errors import SpaceError
from archsearch.model import HybridLM, num_params
from archsearch.recipes import First, baseline, load_recipe, recipe_names, recipe_path, recipes_dir
from archsearch.space import SearchSpace

SHIPPED = sorted(Path(recipes_dir()).parent.rglob("*.yaml"))


def indices(model: ModelSpec, *names: str) -> list[int]:
    return [i for i, block in enumerate(model.blocks) if block.mixer_name in names]


PLACEMENTS = {  # published block numbers of what is rare in each
    "gemma3": ("global", [5, 11, 17, 23, 29, 35, 41, 47]),
    "jamba": ("full", [4, 12, 20, 28]),
    "qwen3-next": ("full", list(range(3, 48, 4))),
    "minimax-01": ("full", list(range(7, 80, 8))),
    "lfm2": ("full", [2, 5, 8, 10, 12, 14]),
    "kimi-linear": ("mla", [3, 7, 11, 15, 19, 23, 26]),
    "samba": ("swa", list(range(1, 18, 2))),
    "nemotron-h": ("full", [7, 18, 29, 40]),
    "falcon-h1": ("both", list(range(36))),
    "transformer": ("full", list(range(32))),
}


def test_every_recipe_has_its_placement_tested() -> None:
    assert recipe_names() == sorted(PLACEMENTS)


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_placements_are_the_published_ones(name: str) -> None:
    space = load_recipe(name)
    assert not space.refusal(space.sample(First()))
    target = space.sample(First()).architecture.at("target")
    mixer, places = PLACEMENTS[name]
    assert indices(target, mixer) == places


SIZES = {  # parameters as published, and how exactly: some are only known by the model's name
    "falcon-h1": (521e6, 0.005),
    "gemma3": (11.8e9, 0.03),
    "jamba": (51.6e9, 0.005),
    "kimi-linear": (48e9, 0.03),
    "lfm2": (1.17e9, 0.005),
    "minimax-01": (456e9, 0.02),
    "nemotron-h": (8.1e9, 0.01),
    "qwen3-next": (80e9, 0.01),
    "samba": (1.3e9, 0.08),
    "transformer": (8.03e9, 0.005),
}
ACTIVE = {"jamba": 12e9, "kimi-linear": 3e9, "minimax-01": 45.9e9}


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_targets_are_as_large_as_published(name: str) -> None:
    target = load_recipe(name).sample(First()).architecture.at("target")
    published, how_exactly = SIZES[name]
    assert cost.params(target) == pytest.approx(published, rel=how_exactly)
    if name in ACTIVE:
        assert cost.active_params(target) == pytest.approx(ACTIVE[name], rel=0.05)


def test_moe_placements() -> None:
    jamba = load_recipe("jamba").sample(First()).architecture.at("target")
    assert [i for i, block in enumerate(jamba.blocks) if block.ffn_name == "moe"] == list(range(1, 32, 2))
    kimi = load_recipe("kimi-linear").sample(First()).architecture.at("target")
    assert [i for i, block in enumerate(kimi.blocks) if block.ffn_name == "dense"] == [0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads_samples_and_builds_on_meta(path: Path) -> None:
    space = SearchSpace.load(path)
    found = check_space(space)
    for architecture in (found.smallest, found.largest):
        assert architecture is not None
        for model in architecture.scales.values():
            with torch.device("meta"):
                assert num_params(HybridLM(model)) == cost.params(model)


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_recipes_fit_a_study_as_baselines(name: str) -> None:
    space = SearchSpace.from_text(TINY.replace("d_model: 32", "d_model: 128").replace("d_model: 64", "d_model: 256"))
    candidate = baseline(name, space)
    proxy = candidate.architecture.at("proxy")
    assert candidate.name == name
    assert (proxy.n_blocks, proxy.d_model, proxy.context) == (4, 128, 64)
    assert candidate.train.tokens == 4096


def test_unknown_and_unfitting_baselines_are_explained() -> None:
    with pytest.raises(SpaceError, match=r"unknown recipe 'jmba'.*Did you mean 'jamba'"):
        recipe_path("jmba")
    with pytest.raises(SpaceError, match="baseline 'transformer' does not fit the scales"):
        baseline("transformer", SearchSpace.from_text(TINY))
