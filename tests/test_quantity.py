"""Numbers as people write them."""

import pytest

from archsearch.quantity import (
    parse_bytes,
    parse_count,
    parse_number,
    parse_seconds,
    parse_span,
    round_to,
    span_tokens,
)


@pytest.mark.parametrize(
    ("text", "value"), [("4M", 4_000_000), ("16k", 16_000), ("3e9", 3_000_000_000), (8192, 8192), ("1 Ki", 1024)]
)
def test_counts(text: object, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text", ["4X", "1.5", 1.5, True, None, "four", "", [], "nan", "inf", "1e400", "1 KiB", "20 MB"]
)
def test_bad_counts_say_what_was_expected(text: object) -> None:
    with pytest.raises(ValueError, match=r"found .*; expected a whole number such as 4096"):
        parse_count(text)


@pytest.mark.parametrize(("text", "value"), [("512 MiB", 2**29), ("2 GB", 2 * 10**9), (7, 7)])
def test_bytes(text: object, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("10 min", 600.0), (30, 30.0), ("500 ms", 0.5), ("1.5 h", 5400.0)])
def test_seconds(text: object, value: float) -> None:
    assert parse_seconds(text) == value


@pytest.mark.parametrize(("text", "value"), [("8/3", 8 / 3), ("1e-3", 1e-3), (2, 2.0), ("1/16", 0.0625)])
def test_numbers(text: object, value: float) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["8/0", "a/b", True, "1e-3x"])
def test_bad_numbers(text: object) -> None:
    with pytest.raises(ValueError, match="expected a number such as"):
        parse_number(text)


def test_spans_are_tokens_or_a_share_of_the_context() -> None:
    assert parse_span(64) == 64
    assert parse_span("4k") == 4000
    assert parse_span("2/8 context") == "1/4 context"
    assert span_tokens("1/4 context", 512) == 128
    assert span_tokens("1/4 context", 3) == 1  # never no token at all
    assert span_tokens(64, 512) == 64


@pytest.mark.parametrize("text", ["5/4 context", "0/4 context", 0, -3, "1/4 contxt"])
def test_bad_spans(text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_span(text)


def test_round_to_rounds_up_but_not_past_a_multiple() -> None:
    assert round_to(682.67, 16) == 688
    assert round_to(688, 16) == 688
    assert round_to(688.0000000001, 16) == 688
