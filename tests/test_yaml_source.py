"""Plain data with line numbers; hostile files are refused with one."""

from pathlib import Path

import pytest

from archsearch.errors import SpaceError
from archsearch.space.yaml_source import parse_yaml, read_yaml


def test_lines_point_at_keys_and_items() -> None:
    source = parse_yaml("a: 1\nb:\n  c: [x,\n      y]\n")
    assert source.tree == {"a": 1, "b": {"c": ["x", "y"]}}
    assert source.line(("b", "c")) == 3
    assert source.line(("b", "c", 1)) == 4
    assert source.line(("b", "c", 7, "z")) == 3  # the nearest node above
    assert source.where(("a",)) == "space.yaml:1"


def test_aliases_work_in_moderation() -> None:
    assert parse_yaml("a: &x {k: 1}\nb: *x").tree == {"a": {"k": 1}, "b": {"k": 1}}


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", r"space\.yaml:1: found the tag .*python/object"),
        ("a: !!str 1", "found the tag"),
        ("a: 1\na: 2", r"space\.yaml:2: the key 'a' appears twice"),
        ("a: [1", r"space\.yaml:\d: not valid YAML"),
        ("a: &a [*a]", "an alias contains itself"),
        ("? [1, 2]\n: 3", "found a list or mapping as a key"),
        ("<<: {a: 1}", "found '<<' as a key"),
        ("", "the file is empty"),
        ("a: " + "[" * 60 + "]" * 60, "nested deeper than 40"),
        ("a: " + "{b: " * 60 + "1" + "}" * 60, "nested deeper than 40"),
        (BOMB, "aliases expand to more than 20,000 nodes"),
        ("a: *nowhere", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("a:\n  b: 1\n\tc: 2\n", r"space\.yaml:3: not valid YAML: found a tab; YAML indents with spaces"),
        ("a:\n\tb: 1\n", r"space\.yaml:2: .*found a tab"),
        ("a:\n  - b\n  \t- c\n", r"space\.yaml:3: .*found a tab"),
    ],
)
def test_hostile_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        parse_yaml(text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="no such file"):
        read_yaml(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(SpaceError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(SpaceError, match="at most 1,000,000"):
        read_yaml(tmp_path / "big.yaml")
    with pytest.raises(SpaceError, match="cannot be read"):
        read_yaml(tmp_path)


def test_dates_stay_text() -> None:
    assert parse_yaml("a: 2026-01-01").tree == {"a": "2026-01-01"}
