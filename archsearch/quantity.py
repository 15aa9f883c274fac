"""Numbers as people write them in YAML: `4M`, `512 MiB`, `8/3`, `10 min`, `1e-3`, `1/4 context`.

Each `parse_*` takes what YAML gave (str, int or float) and returns a plain number, or raises ValueError
with what was found and what was expected. The Annotated types at the end are used in the pydantic specs.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator

SI = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
IEC = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {f"{prefix}B": factor for prefix, factor in IEC.items()}
SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_WITH_UNIT = re.compile(rf"^\s*({NUMBER})\s*([A-Za-z]*)\s*$")
_FRACTION = re.compile(rf"^\s*({NUMBER})\s*/\s*({NUMBER})\s*$")
_OF_CONTEXT = re.compile(r"^\s*(\d+)\s*/\s*(\d+)\s+context\s*$")


def _scaled(value: object, units: dict[str, int] | dict[str, float], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"found {value!r}; expected {expected}")
    if isinstance(value, int | float):
        return value
    match = _WITH_UNIT.match(value)
    if match is None or match[2] not in units:
        raise ValueError(f"found {value!r}; expected {expected}")
    number = float(match[1])
    return (int(number) if number.is_integer() else number) * units[match[2]]


def _whole(number: float, value: object, expected: str) -> int:
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"found {value!r}; expected {expected}")
    return int(number)


def parse_count(value: object) -> int:
    """A whole number with an SI or IEC prefix: 4096, '4M', '16k', '32 Ki', '3e9'. Bytes are no count."""
    expected = "a whole number such as 4096, 4M, 32 Ki or 3e9"
    return _whole(_scaled(value, {**SI, **IEC}, expected), value, expected)


def parse_bytes(value: object) -> int:
    """A size in bytes: 4096, '512 MiB', '2 GB'."""
    expected = "a size such as 4096, 512 MiB or 2 GB"
    return _whole(_scaled(value, {"": 1, **BYTES}, expected), value, expected)


def parse_seconds(value: object) -> float:
    """A duration in seconds: 30, '10 min', '500 ms'."""
    return float(_scaled(value, SECONDS, "a duration such as 30, 10 min or 500 ms"))


def parse_number(value: object) -> float:
    """A real number: 0.001, '1e-3' (a string to YAML 1.1), '8/3'."""
    expected = "a number such as 0.001, 1e-3 or 8/3"
    if isinstance(value, str) and (match := _FRACTION.match(value)):
        if float(match[2]) == 0:
            raise ValueError(f"found {value!r}; expected {expected}")
        return float(Fraction(match[1]) / Fraction(match[2]))
    return float(_scaled(value, {"": 1}, expected))


def parse_span(value: object) -> int | str:
    """A number of tokens, or a fraction of the scale's context: 64, '4k', '1/4 context'."""
    expected = "a number of tokens such as 64, or a fraction such as '1/4 context'"
    if isinstance(value, str) and (match := _OF_CONTEXT.match(value)):
        top, bottom = int(match[1]), int(match[2])
        if not 0 < top <= bottom:
            raise ValueError(f"found {value!r}; expected a fraction of the context in (0, 1]")
        part = Fraction(top, bottom)
        return f"{part.numerator}/{part.denominator} context"
    tokens = _whole(_scaled(value, SI, expected), value, expected)
    if tokens < 1:
        raise ValueError(f"found {value!r}; expected at least 1 token")
    return tokens


def parse_bound(value: object, unit: str) -> float:
    """A bound on an objective measured in `unit`: a plain number, or one with a unit: '5 ms', '1 GiB', '20M'."""
    counts = {name: float(factor) for name, factor in {**SI, **IEC}.items()}
    known: dict[str, tuple[dict[str, float], str]] = {
        "ms": ({name: 1e3 * seconds for name, seconds in SECONDS.items() if name}, "5 or 5 ms"),
        "bytes": ({name: float(factor) for name, factor in BYTES.items()}, "4096 or 512 MiB"),
        "parameters": (counts, "20M or 3e9"),
        "FLOPs": (counts, "20M or 3e9"),
    }
    units, such_as = known.get(unit, ({}, "1.2"))
    try:
        return parse_number(value)
    except ValueError:
        return float(_scaled(value, units, f"a number of {unit} such as {such_as}"))


def span_tokens(span: int | str, context: int) -> int:
    """Tokens of a parsed span at a given context, at least 1."""
    if isinstance(span, int):
        return span
    return max(1, math.floor(Fraction(span.split()[0]) * context))


def round_to(value: float, multiple: int) -> int:
    """The multiple nearest to `value` from above (hidden widths that tensor cores like)."""
    return multiple * math.ceil(value / multiple - 1e-9)


Count = Annotated[int, BeforeValidator(parse_count)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Number = Annotated[float, BeforeValidator(parse_number)]
Span = Annotated[int | str, BeforeValidator(parse_span)]
