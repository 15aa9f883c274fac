"""`check`: counts, samples and warnings, without training."""

import pytest
from spaces import TINY, WIDE

from archsearch.check import check_space
from archsearch.choosers import RandomChooser, Uncountable, enumerate_space
from archsearch.errors import SpaceError
from archsearch.space import SearchSpace


def test_a_small_space_is_counted_exactly() -> None:
    space = SearchSpace.from_text(TINY)
    found = check_space(space)
    ids = {c.architecture.arch_id for c in enumerate_space(space) if c is not None}
    assert found.counted
    assert found.distinct == len(ids)
    # kv_groups 2 x ratios 2 x places 2; ratio 1 and 3 at 4 blocks differ, so nothing coincides but what truly is equal
    assert found.distinct == 8
    assert found.smallest is not None
    assert found.largest is not None
    text = found.text()
    assert "8 distinct, counted one by one" in text
    assert "of state at 256 tokens" in text


def test_a_large_space_is_estimated() -> None:
    found = check_space(SearchSpace.from_text(WIDE.replace("rope_theta: {log_range: [1e4, 1e6]}", "rope_theta: 1e4")))
    assert not found.counted
    assert found.combinations > 1e4
    assert "estimated" in found.text()
    assert 0 < found.n_passed < found.n_samples
    assert any("mixer[0] != full" in rule for rule in found.refused_by)


def test_continuous_holes_have_no_count() -> None:
    space = SearchSpace.from_text(TINY.replace("expand: 2", "expand: {log_range: [1, 4]}"))
    with pytest.raises(Uncountable):
        list(enumerate_space(space))
    assert check_space(space).to_json()["combinations"] is None
    assert "without number" in check_space(space).text()


def test_impossible_rules_are_an_error() -> None:
    space = SearchSpace.from_text(TINY + "rules: [count(full) > 100]\n")
    with pytest.raises(SpaceError, match=r"no candidate passes the rules \(.*count\(full\) > 100"):
        check_space(space)


def test_a_window_as_long_as_the_proxy_is_warned_about() -> None:
    space = SearchSpace.from_text(TINY.replace("window: 1/4 context", "window: 100"))
    assert any("mixers.swa.window is 100 at the proxy's context of 64" in w for w in check_space(space).warnings)
    assert not check_space(SearchSpace.from_text(TINY)).warnings


def test_knuths_estimate_is_near_the_truth() -> None:
    space = SearchSpace.from_text(TINY)
    total = 0.0
    for seed in range(50):
        chooser = RandomChooser(seed)
        space.sample(chooser)
        total += chooser.branching
    assert total / 50 == 8
