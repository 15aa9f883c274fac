"""Holes: well formed or explained, filled once per name, nested ones only where their option is taken."""

from collections.abc import Sequence
from typing import Any

import pytest

from archsearch.choosers import FixedChooser, RandomChooser
from archsearch.space.holes import Filling, HoleError, check_hole, find_holes, hole_name


class Scripted:
    """Takes given option numbers by name and notes what it was asked."""

    def __init__(self, **picks: int) -> None:
        self.picks = {name.replace("__", "."): pick for name, pick in picks.items()}
        self.asked: list[str] = []

    def choice(self, name: str, options: Sequence[Any]) -> int:
        self.asked.append(name)
        return self.picks.get(name, 0)

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        self.asked.append(name)
        return high

    def real(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        self.asked.append(name)
        return low


TREE = {
    "a": {"choice": [1, {"x": {"choice": ["p", "q"]}}]},
    "n": {"range": [2, 9, 3]},
    "lr": {"log_range": ["1e-4", 1]},
}


def test_nested_holes_exist_only_when_their_option_is_taken() -> None:
    chooser = Scripted()
    assert Filling(chooser).fill(TREE, ()) == {"a": 1, "n": 8, "lr": 1e-4}
    assert chooser.asked == ["a", "n", "lr"]
    chooser = Scripted(**{"a": 1, "a[1].x": 1})
    filling = Filling(chooser)
    assert filling.fill(TREE, ()) == {"a": {"x": "q"}, "n": 8, "lr": 1e-4}
    assert chooser.asked == ["a", "a[1].x", "n", "lr"]
    assert filling.picked == {"a": {"x": {"choice": ["p", "q"]}}, "a[1].x": "q", "n": 8, "lr": 1e-4}


def test_a_range_never_leaves_its_ends() -> None:
    for seed in range(50):
        filled = Filling(RandomChooser(seed)).fill(TREE, ())
        assert filled["n"] in (2, 5, 8)
        assert 1e-4 <= filled["lr"] <= 1


def test_origin_leads_back_to_the_file() -> None:
    filling = Filling(Scripted(a=1))
    filling.fill(TREE, ())
    assert filling.origin[("a", "x")] == ("a", "choice", 1, "x", "choice", 0)
    assert hole_name(("a", "choice", 1, "x")) == "a[1].x"
    assert find_holes(TREE) == [("a",), ("a", "choice", 1, "x"), ("n",), ("lr",)]


def test_a_record_fills_the_same_way_again() -> None:
    filling = Filling(RandomChooser(3))
    filled = filling.fill(TREE, ())
    assert Filling(FixedChooser(filling.picked)).fill(TREE, ()) == filled
    with pytest.raises(KeyError):
        Filling(FixedChooser({})).fill(TREE, ())
    with pytest.raises(ValueError, match="no longer an option"):
        Filling(FixedChooser({**filling.picked, "a": 7})).fill(TREE, ())
    with pytest.raises(ValueError, match="no longer in the range"):
        Filling(FixedChooser({**filling.picked, "n": 3})).fill(TREE, ())


def test_per_block_asks_for_every_block() -> None:
    tree = {"w": {"choice": [1, 2], "per": "block"}, "v": {"choice": [1, 2]}}
    filling = Filling(chooser := Scripted())
    for filling.block in (0, 1):
        filling.fill(tree, ("m",))
    assert chooser.asked == ["m.w@0", "m.v", "m.w@1"]
    with pytest.raises(HoleError, match="only holes inside mixers and ffns"):
        Filling(Scripted()).fill(tree, ("m",))


@pytest.mark.parametrize(
    ("hole", "message"),
    [
        ({"choice": []}, "a list with at least one option"),
        ({"choice": 3}, "a list with at least one option"),
        ({"choice": [1], "range": [1, 2]}, "holds choice and range"),
        ({"choice": [1], "pre": "block"}, "Did you mean 'per'"),
        ({"choice": [1], "per": "blok"}, "expected block or stage"),
        ({"range": [1]}, r"expected \[low, high\] or"),
        ({"range": [3, 1]}, "a low end that is not above"),
        ({"range": [1, 3, 0]}, "a step above 0"),
        ({"range": ["a", 3]}, "as numbers"),
        ({"range": [1, True]}, "as numbers"),
        ({"range": [1, float("inf")]}, "a low end"),
        ({"log_range": [0, 3]}, "a low end above 0"),
        ({"log_range": [1, 3, 1]}, r"expected \[low, high\]"),
    ],
)
def test_malformed_holes(hole: dict[str, Any], message: str) -> None:
    with pytest.raises(HoleError, match=message):
        check_hole(hole, ("a",))
