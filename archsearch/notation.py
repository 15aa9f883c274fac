"""How numbers and layouts are written for people: units, spreads, ticks, folded repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_IEC = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
COUNTED = ("parameters", "FLOPs", "tokens")  # units that read better with an SI prefix


def plain(value: float, digits: int = 4) -> str:
    """About `digits` significant digits, no exponent in the everyday range: 0.0123, 4.21, 12345."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -5 <= size <= 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def si(value: float) -> str:
    """1.23G, 45.6M, 7.8k, 512."""
    for factor, suffix in _SI:
        if abs(value) >= factor:
            return f"{_three(value / factor)}{suffix}"
    return _three(value)


def in_bytes(value: float) -> str:
    """1.5 GiB, 512 MiB, 100 B."""
    for factor, suffix in _IEC:
        if abs(value) >= factor:
            return f"{_three(value / factor)} {suffix}"
    return f"{_three(value)} B"


def _three(value: float) -> str:
    text = plain(value, 3)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def quantity(value: float, unit: str, spread: float | None = None) -> str:
    """A value in its unit's habit, with its spread where one is known: `4.21 ± 0.05`, `1.5 GiB`, `3.1G`."""
    if unit == "bytes":
        return in_bytes(value)
    if unit in COUNTED:
        return si(value)
    if not spread or not math.isfinite(value):
        return plain(value)
    decimals = min(6, max(0, -math.floor(math.log10(spread)) + (f"{spread:e}"[0] == "1")))
    return f"{value:.{decimals}f} ± {spread:.{decimals}f}"


def tick_label(value: float, unit: str) -> str:
    """A round number on an axis."""
    if unit == "bytes":
        return in_bytes(value)
    if unit in COUNTED or abs(value) >= 10_000:
        return si(value)
    return f"{value:.6g}"


def ticks(low: float, high: float, about: int = 5, unit: str = "") -> list[float]:
    """Round numbers inside [low, high], in steps of 1, 2 or 5 times a power of ten; bytes: of the largest prefix."""
    if not high > low:
        return [low]
    if unit == "bytes" and (factor := next((f for f, _ in _IEC if high >= f), 1)) > 1:
        return [factor * tick for tick in ticks(low / factor, high / factor, about)]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, unit: str = "") -> list[float]:
    """1, 2, 5 times powers of ten inside [low, high], or the powers alone if that is too many; bytes: powers of two."""
    base, choices = (2.0, ((1,),)) if unit == "bytes" else (10.0, ((1, 2, 5), (1,)))
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    for factors in choices:
        found = [f * base**p for p in powers for f in factors if low * 0.999 <= f * base**p <= high * 1.001]
        if len(found) <= 9:
            return found
    return found[:: math.ceil(len(found) / 8)]


def run_length(names: Sequence[str]) -> str:
    """Repeats folded, short runs written out: `3x(gdn gdn gdn full)`, `2x(5xswa full) swa`."""
    names = list(names)
    words: list[str] = []
    i = 0
    while i < len(names):
        period, times = _best_repeat(names, i)
        group = names[i : i + period]
        if times == 1 or (period == 1 and times < 4):
            words += [names[i]] * times
        else:
            inside = run_length(group)
            words.append(f"{times}x{inside}" if period == 1 else f"{times}x({inside})")
        i += period * times
    return " ".join(words)


def _best_repeat(names: list[str], start: int, longest: int = 64) -> tuple[int, int]:
    """The period and number of repeats from `start` that save the most words; the shortest period among equals."""
    best, saved = (1, 1), 0
    left = len(names) - start
    for period in range(1, min(longest, left // 2) + 1):
        times, group = 1, names[start : start + period]
        while names[start + period * times : start + period * (times + 1)] == group:
            times += 1
        if period * (times - 1) > saved:
            best, saved = (period, times), period * (times - 1)
    return best
