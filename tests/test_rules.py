"""The rule language: reading, judging, and saying why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archsearch.architecture import Architecture, Block, ModelSpec
from archsearch.cost import params, state_bytes
from archsearch.ffns.swiglu import SwiGLU
from archsearch.mixers.attention import Attention
from archsearch.space.rules import RuleError, parse_rule

NAMES = {"full", "swa", "dense", "attention"}
FULL, SWA = Attention(head_dim=16), Attention(head_dim=16, window=8)


def architecture(layout: str) -> Architecture:
    blocks = tuple(
        Block(FULL if letter == "f" else SWA, SwiGLU(), "full" if letter == "f" else "swa", "dense")
        for letter in layout
    )
    model = ModelSpec(d_model=32, context=64, vocab_size=100, blocks=blocks)
    return Architecture(
        {"proxy": ModelSpec(d_model=32, context=64, vocab_size=100, blocks=blocks[:2]), "target": model}
    )


ARCH = architecture("ssfsss")
TARGET = ARCH.at("target")


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("count(full) >= 1", True),
        ("count(full) > 1", False),
        ("count(full, proxy) == 0", True),
        ("count(attention) == 6", True),  # a kind, since no block is called that
        ("fraction(swa) == 5/6", True),
        ("fraction(swa) < 1/2", False),
        ("run_length(swa) == 3", True),
        ("mixer[0] != full", True),
        ("mixer[2] == full", True),
        ("mixer[-1] == full", False),
        ("ffn[0] == dense", True),
        ("mixer[0] == mixer[1]", True),
        (f"params(target) == {params(TARGET)}", True),
        ("params() <= 1k", False),
        ("params(target) <= 3e9 and count(full) >= 1", True),
        ("count(full) > 3 or count(swa) > 3", True),
        ("not count(full) > 3", True),
        ("not (count(full) > 3 or count(swa) > 3)", False),
        ("count(full) + count(swa) == 6", True),
        ("count(full) * 2 - 1 == 1", True),
        ("-count(full) == -1", True),
        (f"state_bytes(target, context=1024, batch=2) == {state_bytes(TARGET, 1024, 2)}", True),
        ("state_bytes(target) <= 512 MiB", True),
        ("state_bytes(target) <= 1G", True),
        ("state_bytes(target, context=1 Ki) == state_bytes(target, context=1024)", True),
        ("2 * params(target) <= 20 GB", True),  # bytes of 2-byte weights
        ("2 * params(target) + state_bytes(target) <= 20 GB", True),
        ("state_bytes(target) / count(full) <= 1 MiB", True),
        ("flops(target) >= 2 * params(target)", True),
        ("params(target) > 1 Ki", True),
        ("flops(target, context=32) > 0", True),
        ("(count(full)) >= (1)", True),
        ("count(full)>=1", True),
    ],
)
def test_judgement(text: str, ok: bool) -> None:
    verdict = parse_rule(text, NAMES).judge(ARCH)
    assert verdict.ok is ok
    assert (verdict.violation == 0) is ok


def test_a_refusal_shows_both_sides() -> None:
    verdict = parse_rule("count(full) >= 2", NAMES).judge(ARCH)
    assert verdict.why == "count(full) >= 2 is false: 1 >= 2"
    assert verdict.violation == pytest.approx(0.5)


def test_violation_grows_with_the_distance() -> None:
    near = parse_rule("count(swa) <= 4", NAMES).judge(ARCH).violation
    far = parse_rule("count(swa) <= 1", NAMES).judge(ARCH).violation
    assert 0 < near < far


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count(ful) >= 1", "Did you mean 'full'"),
        ("cout(full) >= 1", "Did you mean 'count'"),
        ("count(full)", "is not true or false"),
        ("params(target) <= 3 GBB", "unknown unit 'GBB'"),
        ("params(taget) <= 3", "expected proxy or target"),
        ("params(target, context=3) <= 3", "it takes no option"),
        ("state_bytes(target, contxt=3) <= 3", "it takes one of batch, context"),
        ("state_bytes(target, context=0) <= 3", "a whole number above 0"),
        ("mixer[x] == full", "expected a block number"),
        ("mixer[0] < full", "compare by == and !="),
        ("mixer[0] == 3", "compare by == and !="),
        ("1 < 2 < 3", "chained comparison; write 'a < b and b < c'"),
        ("count(full) >= 1 )", "after a complete rule"),
        ("(count(full) >= 1", r"where '\)' was expected"),
        ("count(full) >= ", "found 'the end'"),
        ("count(full >= 1", "where a name was expected"),
        ("count() >= 1", "takes a name, found nothing"),
        ("__import__('os')", "cannot read|unknown function"),
        ("count(full) >= 1; 2", "cannot read ';"),
        ("(" * 300 + "1" + ")" * 300, "nested parts"),
        ("1 " * 600, "at most 1000"),
        (7, "expected a rule such as"),
        ("count(full) and 3 > 2", "'and' joins comparisons"),
        ("not 3", "'not' takes a comparison"),
        ("params(target) < 20 ms", "unknown unit 'ms'"),
        ("params(target) < 20 MB", "'<' takes parameters and bytes together.*such as 12, 20M or 3e9"),
        ("active_params() <= 3B", "takes parameters and bytes together"),
        ("20 MiB > flops(target)", "takes FLOPs and bytes together"),
        ("count(full) == 3 kB", "takes blocks and bytes together"),
        ("fraction(full) < 1 GB", "takes a fraction of the blocks and bytes together.*such as 1/2"),
        ("params(target) - 1 MB < 3", "'-' takes parameters and bytes together"),
        ("count(full) >= 1 and params(target) < 20 MB", "takes parameters and bytes together"),
        ("state_bytes(target, context=4 MB) <= 3", "context=4 MB.: found bytes, expected a whole number"),
        ("count(full) = 3", "found '='.*write '==' to compare"),
        ("(mixer[0] = full)", "write '==' to compare"),
    ],
)
def test_mistakes_are_explained(text: object, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        parse_rule(text, NAMES)


def test_evaluation_errors_are_rule_errors() -> None:
    with pytest.raises(RuleError, match="outside the 6 blocks"):
        parse_rule("mixer[6] == full", NAMES).judge(ARCH)
    with pytest.raises(RuleError, match="division by zero"):
        parse_rule("1 / (count(full) - 1) > 0", NAMES).judge(ARCH)


def judged(text: str) -> bool | None:
    """Whether a rule holds; None if it is refused, which must happen with a RuleError and a message."""
    try:
        return parse_rule(text, NAMES).judge(ARCH).ok
    except RuleError as error:
        return None if str(error) else False


@given(st.text(max_size=60))
def test_no_text_does_worse_than_a_rule_error(text: str) -> None:
    assert judged(text) in (None, True, False)


WORDS = [
    "count",
    "(",
    ")",
    "full",
    ",",
    "[",
    "]",
    "mixer",
    "0",
    "1.5",
    "<=",
    "==",
    "and",
    "not",
    "-",
    "*",
    "/",
    "proxy",
]


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_no_sequence_of_words_does_worse_than_a_rule_error(words: list[str]) -> None:
    assert judged(" ".join(words)) in (None, True, False)
