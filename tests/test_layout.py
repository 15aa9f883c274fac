"""How names fill the depth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archsearch.space.layout import LayoutError, apportion, freeze, grow, resolve

NAMES = {"g", "f", "s"}


def names(layout: object, n: int) -> str:
    return "".join(slot.name for slot in resolve(layout, n, NAMES))


@pytest.mark.parametrize(
    ("layout", "n", "expected"),
    [
        ({"pattern": ["g", "g", "g", "f"]}, 10, "gggfgggfgg"),
        ({"pattern": ["g", "g", "g", "g", "g", "f"]}, 4, "gggf"),
        ({"pattern": ["g", "g", "f", "g"]}, 2, "gf"),
        (["g", "f"], 3, "gfg"),
        ("g", 3, "ggg"),
        ({"ratio": {"g": 3, "f": 1}, "place": {"f": "even"}}, 12, "gggfgggfgggf"),  # Qwen3-Next: 3, 7, 11
        ({"ratio": {"g": 3, "f": 1}, "place": {"f": "first"}}, 8, "ffgggggg"),
        ({"ratio": {"g": 3, "f": 1}, "place": {"f": "last"}}, 8, "ggggggff"),
        ({"ratio": {"g": 3, "f": 1}, "place": {"f": "middle"}}, 8, "gggffggg"),
        ({"ratio": {"g": 5, "f": 3}, "place": {"f": "ends"}}, 8, "fgggggff"),
        ({"ratio": {"g": 3, "f": 1}}, 8, "gggfgggf"),  # no place: mixed evenly
        ({"ratio": {"g": 2, "f": 1, "s": 1}, "place": {"f": "last"}}, 8, "ggsggsff"),
        ({"ratio": {"g": 7, "f": 1}}, 4, "gggf"),  # at least one of each
        ({"ratio": {"g": 1, "f": 0}}, 3, "ggg"),
        ({"blocks": ["g", "f"], "grow": "stretch"}, 4, "ggff"),
        ({"blocks": ["g", "f"], "grow": "stack"}, 4, "gfgf"),
        ({"pattern": ["g"], "first": "f", "last": ["s", "f"]}, 5, "fggsf"),
        ({"stages": [{"of": "1/2", "pattern": ["s"]}, {"of": "1/2", "pattern": ["g", "f"]}]}, 8, "ssssgfgf"),
        ({"stages": [{"of": "1/3", "pattern": ["s"]}, {"of": "2/3", "pattern": ["g"], "last": "f"}]}, 7, "ssggggf"),
    ],
)
def test_forms(layout: object, n: int, expected: str) -> None:
    assert names(layout, n) == expected


def test_stages_number_their_slots() -> None:
    layout = {"stages": [{"of": 0.5, "pattern": ["s"]}, {"of": 0.5, "pattern": ["g"]}]}
    assert [slot.stage for slot in resolve(layout, 4, NAMES)] == [0, 0, 1, 1]


def test_stretching_down_keeps_rare_names_and_their_order() -> None:
    jamba = ["g"] * 4 + ["f"] + ["g"] * 3
    assert grow(jamba * 4, 8) == jamba
    assert grow(jamba, 4).count("f") == 1
    assert grow(["f", *["g"] * 20], 5)[0] == "f"


@given(st.lists(st.sampled_from("gfs"), min_size=1, max_size=40), st.integers(1, 60))
def test_grow_gives_the_length_and_no_stranger(listed: list[str], n: int) -> None:
    for how in ("stretch", "stack"):
        grown = grow(listed, n, how)  # type: ignore[arg-type]
        assert len(grown) == n
        assert set(grown) <= set(listed)
    if n >= len(set(listed)):
        assert set(grow(listed, n)) == set(listed)
    if n == len(listed):
        assert grow(listed, n) == listed


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1), st.integers(1, 64))
def test_apportion_adds_up(shares: dict[str, int], total: int) -> None:
    counts = apportion(shares, total)
    assert sum(counts.values()) == total
    if total >= len(shares):
        assert min(counts.values()) >= 1


@given(
    st.dictionaries(st.sampled_from("gfs"), st.integers(1, 9), min_size=1),
    st.dictionaries(st.sampled_from("gfs"), st.sampled_from(["even", "first", "middle", "last", "ends"])),
    st.integers(1, 64),
)
def test_ratio_places_every_count(ratio: dict[str, int], place: dict[str, str], n: int) -> None:
    place = {name: where for name, where in place.items() if name in ratio}
    filled = names({"ratio": ratio, "place": place}, n)
    assert {name: filled.count(name) for name in ratio} == {name: apportion(ratio, n)[name] for name in ratio}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"pattern": ["g", "x"]}, "is 'x'; expected one of f, g, s"),
        ({"pattern": []}, "expected a list of names"),
        ({"patern": ["g"]}, "Did you mean 'pattern'"),
        ({"pattern": ["g"], "ratio": {"g": 1}}, "has pattern and ratio; expected exactly one of"),
        ({"pattern": ["g"], "place": {}}, "has an unknown key 'place'"),
        ({"ratio": {"g": -1}}, "a share of at least 0"),
        ({"ratio": {"g": 0}}, "has no share above 0"),
        ({"ratio": {"g": 1}, "place": {"f": "even"}}, "is 'f'; expected g"),
        ({"ratio": {"g": 1}, "place": {"g": "evn"}}, "Did you mean 'even'"),
        ({"blocks": ["g"], "grow": "grow"}, "expected stretch or stack"),
        ({"stages": [{"of": "1/3", "pattern": ["g"]}]}, r"add up to 0\.333333; expected 1"),
        ({"stages": [{"of": 2, "pattern": ["g"]}]}, r"a fraction in \(0, 1\]"),
        ({"stages": [{"pattern": ["g"]}]}, "of: <fraction"),
        ({"stages": [{"of": "half", "pattern": ["g"]}]}, r"is 'half'; expected a fraction in"),
        ({"ratio": {"g": "many"}}, "is 'many'; expected a share of at least 0"),
        (7, "expected a mapping"),
    ],
)
def test_mistakes_are_explained(layout: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        resolve(layout, 6, NAMES)


def test_freeze_asks_once_per_block_and_stage() -> None:
    asked = []

    def choose(path: tuple[str | int, ...], block: int, options: list[str]) -> int:
        asked.append((path, block))
        return block % len(options)

    layout = {"stages": [{"of": "1/2", "pattern": ["s"]}, {"of": "1/2", "each": ["g", "f"]}]}
    frozen = freeze(layout, 6, choose)
    assert frozen["stages"][1] == {"of": "1/2", "blocks": ["g", "f", "g"]}
    assert asked == [(("stages", 1, "each"), i) for i in range(3)]
    assert names(frozen, 12) == "ssssssggffgg"
