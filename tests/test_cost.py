"""Costs read off the graph against models that are really built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces import TINY, WIDE

from archsearch import cost
from archsearch.architecture import ModelSpec
from archsearch.choosers import RandomChooser
from archsearch.model import HybridLM, build_model, num_params
from archsearch.space import SearchSpace

SPACES = [SearchSpace.from_text(TINY), SearchSpace.from_text(WIDE)]


def sampled(seed: int, scale: str) -> ModelSpec:
    space = SPACES[seed % 2]
    while space.refusal(candidate := space.sample(RandomChooser(seed))) is not None:
        seed += 2
    return candidate.architecture.at(scale)


@given(st.integers(0, 10**6), st.sampled_from(["proxy", "target"]))
@settings(deadline=None, max_examples=30)
def test_params_equal_the_built_model(seed: int, scale: str) -> None:
    model = sampled(seed, scale)
    with torch.device("meta"):
        assert cost.params(model) == num_params(HybridLM(model))
    assert cost.active_params(model) <= cost.params(model)


@pytest.mark.parametrize("seed", range(0, 8, 2))
def test_state_bytes_equal_the_allocated_state(seed: int) -> None:
    model = sampled(seed, "proxy")
    built = build_model(model)
    for context, batch in ((model.context, 1), (3 * model.context, 2)):
        assert cost.state_bytes(model, context, batch) == built.init_state(batch, context).num_bytes()


def test_flops_grow_with_the_context_and_a_window_saves_some() -> None:
    model = sampled(0, "target")
    assert cost.flops(model, 64) < cost.flops(model, 128)
    assert cost.step_flops(model, 16) < cost.step_flops(model, 128)
    assert cost.flops_per_token(model, 128) == cost.flops(model, 128) / 128
