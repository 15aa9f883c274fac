"""The front as a table for terminals, and what stands below it."""

import example_run
import pytest
from example_run import settings, trial

from archsearch.report import build_front, summary
from archsearch.report.blocks import describe
from archsearch.store import Measured, TrialRecord


@pytest.fixture(scope="module")
def records() -> list[TrialRecord]:
    return example_run.records()


def test_summary_fits_and_reads(records: list[TrialRecord]) -> None:
    text = summary(records, settings(), width=110)
    lines = text.splitlines()
    assert lines[0].startswith("linear-sparse-full: ")
    assert lines[0].endswith("(16 complete, 2 duplicate, 7 failed, 3 refused)")
    assert all(len(line) <= 110 for line in lines)
    assert "baselines not on the front:" in lines
    member = next(line for line in lines if "qwen3-next" in line)
    assert "12x(gdn gdn gdn full)" in member
    assert "±" in member


@pytest.mark.parametrize("width", [140, 110, 80, 60])
def test_the_summary_shows_every_layout_whole(records: list[TrialRecord], width: int) -> None:
    lines = summary(records, settings(), width=width).splitlines()
    assert all(len(line) <= width for line in lines[1:])
    assert not [line for line in lines if "…" in line]
    shown = [p for p in build_front(records, settings()).points if p.on_front or p.is_baseline]
    named = {p.record.trial: " ".join(str(s) for s in (p.number, p.record.name) if s is not None) for p in shown}
    starts = [next(k for k, line in enumerate(lines) if line.startswith(f"{named[p.record.trial]} ")) for p in shown]
    for point, start in zip(shown, starts, strict=True):
        after = [k for k in starts if k > start] + [k for k, s in enumerate(lines) if s.startswith("base") or not s]
        block = " ".join(lines[start : min(k for k in after if k > start)]).split()
        layout = describe(point.record.architecture["target"]).split()
        assert block[-len(layout) :] == layout
    assert ("state" in lines[2]) == (width == 140)  # it is the first column to go
    assert ("arch_id" in lines[2]) == (width >= 110)
    assert ("trial" in lines[2].split()) == (width >= 110)
    assert "P(front)" in lines[2]


def failed(number: int, reason: str, message: str, **objectives: float) -> TrialRecord:
    read = {name: Measured(value=value) for name, value in objectives.items()}
    return trial(number, 1, 1, status="infeasible", reason=reason, message=message, objectives=read)


def test_without_a_front_the_summary_says_what_no_trial_met() -> None:
    goals = [
        {"name": "val_bpb", "goal": "max", "limit": 9},
        {"name": "decode_ms", "goal": "min", "limit": 50, "unit": "ms"},
    ]
    slow = [failed(k, "limit", "slow", decode_ms=ms) for k, ms in enumerate((81.25, 67.5, 70.0))]
    lines = summary(slow, settings(objectives=goals)).splitlines()
    assert lines[0].endswith(": 3 refused; no front yet")
    refused = "  warning: the limit decode_ms <= 50 ms refused 3 of {} trials; nearest: 67.50 ms (trial 1)"
    assert lines[1:] == [refused.format(3)]
    some = [*slow, failed(3, "limit", "bad", decode_ms=40.0, val_bpb=8.0), failed(4, "out_of_memory", "96 GiB\x1b")]
    lines = summary(some, settings(objectives=goals)).splitlines()
    assert lines[1:] == [
        "  warning: the limit val_bpb >= 9 refused 1 of 5 trials; nearest: 8.000 (trial 3)",
        refused.format(5),
        "  1 out_of_memory, such as: 96 GiB?",
    ]
    within = [failed(0, "limit", "a", decode_ms=60.0), failed(1, "crash", "b", decode_ms=40.0, val_bpb=10.0)]
    assert summary(within, settings(objectives=goals)).splitlines()[1:] == [
        "  warning: the limit decode_ms <= 50 ms refused 1 of 2 trials; nearest: 60.00 ms (trial 0)",
        "  1 crash, such as: b",
    ]


def test_what_limits_refused_is_told_below_a_front_too(records: list[TrialRecord]) -> None:
    goals = [*settings()["objectives"][:1], {"name": "decode_ms", "goal": "min", "unit": "ms", "limit": 1}]
    noisy = failed(90, "limit", "slow", val_bpb=1.0)
    noisy = noisy.model_copy(update={"objectives": {"decode_ms": Measured(value=1.5, spread=0.6, n=20)}})
    text = summary([*records, noisy, failed(91, "limit", "slow", decode_ms=3.0)], settings(objectives=goals))
    told = next(part for part in text.split("\n\n") if "the limit" in part).replace("\n", " ")
    assert told.startswith("the limit decode_ms <= 1 ms refused 2 of ")
    assert told.endswith(" trials; nearest: 1.5 ± 0.6 ms, noisy (trial 90)")
    assert "the limit" not in summary(records, settings())


def test_what_failed_is_told_below_a_front_with_an_example_of_each_reason(records: list[TrialRecord]) -> None:
    text = " ".join(summary(records, settings()).split())
    broken = [r for r in records if r.reason not in (None, "rule", "graph", "limit")]
    for reason in {r.reason for r in broken}:
        those = [r for r in broken if r.reason == reason]
        assert f"{len(those)} failed ({reason}), such as trial {those[-1].trial}: " in text
    long = summary([failed(0, "exception", "no " * 500), trial(1, 1, 1)], settings())
    assert "trial 0: no no" in long
    assert long.endswith("no ...")
    assert len(long) < 900


def test_sizes_that_are_objectives_are_no_columns_and_chances_need_noise() -> None:
    goals = [{"name": "val_bpb", "goal": "min"}, {"name": "state_bytes", "goal": "min", "unit": "bytes"}]
    rows = [
        trial(k, 1, 1, objectives={"val_bpb": Measured(value=1.0 + k), "state_bytes": Measured(value=9.0 - k)})
        for k in range(2)
    ]
    header = summary(rows, settings(objectives=goals)).splitlines()[2].split()
    assert header == ["arch_id", "trial", "val_bpb", "state_bytes", "params", "layout", "at", "target"]


def test_summary_lets_no_escape_sequence_through() -> None:
    text = summary([trial(0, 1, 5, name="\x1b[31mred\x07")], settings(name="a\x1b]0;x\x07"))
    assert text.isprintable() or {c for c in text if not c.isprintable()} == {"\n"}
