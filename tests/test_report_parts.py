"""The report's small parts: numbers, layouts in words, colours, label places, markup, the picture."""

import io
import itertools
from typing import Any

import example_run
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsearch.notation import in_bytes, log_ticks, plain, quantity, run_length, si, tick_label, ticks
from archsearch.report import build_front
from archsearch.report.blocks import describe, letters, mixer_kind
from archsearch.report.markup import Markup, escape, join, tag
from archsearch.report.palette import FFN_COLOURS, MIXER_COLOURS, ffn_colour, ink_on, luminance, mixer_colour
from archsearch.report.picture import picture
from archsearch.report.plot import make_plot


@pytest.mark.parametrize(
    ("value", "unit", "spread", "shown"),
    [
        (4.2134, "ms", 0.051, "4.21 ± 0.05"),
        (4.2134, "ms", 0.0147, "4.213 ± 0.015"),
        (46.79, "ms", 0.6, "46.8 ± 0.6"),
        (1234.5, "ms", 30.0, "1234 ± 30"),
        (4.2134, "ms", None, "4.213"),
        (4.2134, "ms", 0.0, "4.213"),
        (0.0, "", None, "0"),
        (0.000012, "", None, "0.00001200"),
        (1.5e12, "", None, "1.500e+12"),
        (float("nan"), "", None, "nan"),
        (1536, "bytes", None, "1.5 KiB"),
        (3 * 2**30, "bytes", 5.0, "3 GiB"),
        (12, "bytes", None, "12 B"),
        (1_630_000_000, "parameters", None, "1.63G"),
        (999, "FLOPs", None, "999"),
    ],
)
def test_quantities(value: float, unit: str, spread: float | None, shown: str) -> None:
    assert quantity(value, unit, spread) == shown


def test_prefixes() -> None:
    assert [si(v) for v in (0, 12, 4_000_000, 2.5e12)] == ["0", "12", "4M", "2.5T"]
    assert in_bytes(512 * 2**20) == "512 MiB"
    assert plain(-0.5) == "-0.5000"
    assert tick_label(20_000, "ms") == "20k"
    assert tick_label(0.1 + 0.2, "") == "0.3"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_inside_and_few(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 11
    step = found[1] - found[0]
    assert low - 1e-6 * width <= found[0]
    assert found[-1] <= low + width + 1e-6 * width
    assert f"{step:.3e}"[0] in "1259"  # 1, 2, 5, or a hair below 1 or 10


@given(st.floats(1e-6, 1e6), st.floats(10, 1e9))
def test_log_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert 1 <= len(found) <= 9
    assert found == sorted(found)
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in found)


def test_ticks_of_a_point() -> None:
    assert ticks(3.0, 3.0) == [3.0]


def expand(text: str) -> list[str]:
    """What a run-length string stands for, read by other means than it was written."""
    words: list[str] = []
    i = 0
    while i < len(text):
        if text[i] == " ":
            i += 1
            continue
        digits = "".join(itertools.takewhile(str.isdigit, text[i:]))
        i += len(digits) + (1 if digits else 0)
        if text[i] == "(":
            depth, end = 0, i
            while True:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                if depth == 0:
                    break
                end += 1
            words += expand(text[i + 1 : end]) * int(digits)
            i = end + 1
        else:
            name = "".join(itertools.takewhile(lambda c: c != " ", text[i:]))
            words += [name] * int(digits or 1)
            i += len(name)
    return words


@given(st.lists(st.sampled_from("abc"), max_size=30))
@settings(deadline=None)
def test_run_length_loses_nothing(names: list[str]) -> None:
    assert expand(run_length(names)) == names


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ("gdn gdn gdn full " * 3, "3x(gdn gdn gdn full)"),
        ("swa swa swa swa swa full " * 8, "8x(5xswa full)"),
        ("full " * 48, "48xfull"),
        ("a a a", "a a a"),
        ("dense " + "moe " * 47, "dense 47xmoe"),
        ("a b a b c", "2x(a b) c"),
        ("", ""),
    ],
)
def test_run_length(names: str, shown: str) -> None:
    assert run_length(names.split()) == shown


def test_long_layouts_are_quick() -> None:
    assert run_length(["a", "b", "c", "d"] * 1024) == "1024x(a b c d)"


def test_describe_names_sharing() -> None:
    arch = example_run.architecture(["full"], ["dense"], "kv")
    assert describe(arch["proxy"]) == "12xfull | 12xdense | kv reused by 6"
    assert describe({}) == " | "


def test_windowed_attention_is_a_kind_of_its_own() -> None:
    assert mixer_kind({"kind": "attention", "window": 64}) == "attention, windowed"
    assert mixer_kind({"kind": "attention"}) == "attention"
    assert mixer_kind({"kind": "moba", "window": 64}) == "moba"
    assert mixer_kind("mamba") == "mamba"


@given(st.lists(st.text(max_size=4), max_size=12, unique=True))
def test_letters_are_short_and_mostly_distinct(names: list[str]) -> None:
    marks = letters(names)
    assert set(marks) == set(names)
    assert all(1 <= len(mark) <= 4 for mark in marks.values())  # one character may have two as a capital


def test_letters() -> None:
    assert letters(["full", "gdn", "fast", "full"]) == {"full": "F", "gdn": "G", "fast": "Fa"}


VISION = {  # Machado, Oliveira and Fernandes 2009, severity 1; on linear RGB
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def cielab(colour: str, vision: Any) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(vision) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in to_xyz @ seen / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("colours", [MIXER_COLOURS, FFN_COLOURS], ids=["mixers", "ffns"])
def test_colours_are_told_apart_with_any_vision(colours: dict[str, str], vision: str) -> None:
    seen = {kind: cielab(colour, VISION[vision]) for kind, colour in colours.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 20, (a, b)


def test_colours_are_seen_on_both_pages_and_carry_letters() -> None:
    for colour in (*MIXER_COLOURS.values(), *FFN_COLOURS.values()):
        level = luminance(colour)
        assert 0.04 < level < 0.82
        ink = luminance(ink_on(colour))
        assert (max(level, ink) + 0.05) / (min(level, ink) + 0.05) >= 4.5


def test_unknown_kinds_keep_their_colour() -> None:
    assert mixer_colour("hyena") == mixer_colour("hyena") == ffn_colour("hyena")
    assert len({mixer_colour(f"kind{i}") for i in range(50)}) > 4
    assert mixer_colour("none") is None
    assert ffn_colour("none") is None


def test_markup_escapes_whatever_is_not_markup() -> None:
    assert tag("b", "<i>", Markup("<u></u>"), None, 3) == "<b>&lt;i&gt;<u></u>3</b>"
    assert tag("a", href='"x"', class_="y", data_trial=1, hidden=None) == (
        '<a href="&quot;x&quot;" class="y" data-trial="1"></a>'
    )
    assert tag("line", x1=1.0, x2=2.345, y1=-0.001) == '<line x1="1" x2="2.35" y1="-0"></line>'
    assert join(["<", Markup("<")]) == "&lt;<"
    assert escape("a\x00b\ud800\n") == "a\ufffdb\\ud800\n"


def overlaps(a: Any, b: Any) -> bool:
    def box(mark: Any) -> tuple[float, float, float, float]:
        return mark.label_x, mark.label_y - 10, mark.label_x + 7 * len(mark.label), mark.label_y

    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = box(a), box(b)
    return min(ax1, bx1) > max(ax0, bx0) and min(ay1, by1) > max(ay0, by0)


@pytest.mark.parametrize("size", [(980, 520), (360, 380)])
def test_labels_stay_inside_and_apart(size: tuple[float, float]) -> None:
    front = build_front(example_run.records(), example_run.SETTINGS)
    plot = make_plot(front, front.axes[1], front.axes[0], *size)
    labelled = [mark for mark in plot.marks if mark.label]
    assert len(labelled) == len(front.members) + 2
    for mark in labelled:
        assert plot.left <= mark.label_x <= plot.right - 7 * len(mark.label)
        assert plot.top <= mark.label_y <= plot.bottom
    assert not any(overlaps(a, b) for a, b in itertools.combinations(labelled, 2))


def test_the_plot_is_true_to_the_numbers() -> None:
    front = build_front(example_run.records(), example_run.SETTINGS)
    plot = make_plot(front, front.axes[1], front.axes[0], 980, 520)
    by_time = sorted(plot.marks, key=lambda m: m.point.record.objectives["decode_ms"].value)
    assert [m.x for m in by_time] == sorted(m.x for m in by_time)
    by_quality = sorted(plot.marks, key=lambda m: m.point.record.objectives["val_bpb"].value)
    assert [m.y for m in by_quality] == sorted((m.y for m in by_quality), reverse=True)
    for mark in plot.marks:
        assert mark.x_bar is not None
        assert mark.x_bar[0] < mark.x < mark.x_bar[1]
    corners = set(plot.stairs)
    assert all((m.x, m.y) in corners for m in plot.marks if m.point.on_front)


@pytest.mark.parametrize(("factor", "is_log"), [(3.0, False), (30.0, True)])
def test_wide_times_get_a_log_axis(factor: float, is_log: bool) -> None:
    base = example_run.records()[3]

    def at(i: int, ms: float) -> Any:
        measured = {"val_bpb": {"value": 1.0 - 0.1 * i}, "decode_ms": {"value": ms, "spread": 2.0}}
        return base.model_validate({**base.model_dump(), "trial": i, "arch_id": str(i), "objectives": measured})

    front = build_front([at(0, 1.0), at(1, factor**0.5), at(2, factor)], example_run.SETTINGS)
    plot = make_plot(front, front.axes[1], front.axes[0], 980, 520)
    x = sorted(mark.x for mark in plot.marks)
    assert (abs((x[1] - x[0]) - (x[2] - x[1])) < 1e-6) == is_log
    assert all(plot.left <= end <= plot.right for mark in plot.marks for end in mark.x_bar or ())


def test_the_picture_takes_any_name() -> None:
    from matplotlib import image

    trials = example_run.records()
    trials[1] = trials[1].model_copy(update={"name": r"$\frac{"})
    trials[2] = trials[2].model_copy(update={"name": "模型 🚀"})
    pixels = image.imread(io.BytesIO(picture(build_front(trials, example_run.SETTINGS), dpi=50)))
    assert pixels.shape[:2] == (250, 510)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
