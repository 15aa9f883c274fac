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
    "samba": ("swa", list(range(1, 36, 2))),
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
