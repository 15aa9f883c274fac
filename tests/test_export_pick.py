"""Which trial `--pick` means."""

from __future__ import annotations

import pytest
from example_run import SETTINGS, architecture, record, records
from example_run import failed as infeasible

from archsearch import pareto
from archsearch.errors import ExportError
from archsearch.export.pick import introduce, pick
from archsearch.report import build_front

RECORDS = records()


def test_the_knee_and_the_ends_are_on_the_front() -> None:
    front = build_front(RECORDS, SETTINGS)
    members = {p.record.trial for p in front.members}
    knee = pick(RECORDS, SETTINGS, "knee")
    assert knee == front.points[pareto.knee(front.costs(front.points))].record
    assert {knee.trial, pick(RECORDS, SETTINGS, "best:decode_ms").trial} <= members
    best = pick(RECORDS, SETTINGS, "best:val_bpb")
    assert best.objectives["val_bpb"].value == min(p.record.objectives["val_bpb"].value for p in front.points)


def test_a_goal_to_maximise() -> None:
    settings = {**SETTINGS, "objectives": [{"name": "val_bpb", "goal": "max"}, {"name": "decode_ms", "goal": "min"}]}
    best = pick(RECORDS, settings, "best:val_bpb")
    complete = [r for r in RECORDS if r.status == "complete"]
    assert best.objectives["val_bpb"].value == max(r.objectives["val_bpb"].value for r in complete)


def test_the_best_within_a_bound() -> None:
    complete = [r for r in RECORDS if r.status == "complete" and r.repeat_of is None]
    times = sorted(r.objectives["decode_ms"].value for r in complete)
    bound = times[len(times) // 2]
    for written in (f"{bound!r}", f"{bound!r} ms", f"{bound / 1000!r} s"):
        chosen = pick(RECORDS, SETTINGS, f"best:val_bpb:decode_ms={written}")
        within = [r for r in complete if r.objectives["decode_ms"].value <= bound]
        assert chosen == min(within, key=lambda r: r.objectives["val_bpb"].value)
    assert chosen != pick(RECORDS, SETTINGS, "best:val_bpb")
    turned = {**SETTINGS, "objectives": [{"name": "val_bpb", "goal": "min"}, {"name": "decode_ms", "goal": "max"}]}
    above = [r for r in complete if r.objectives["decode_ms"].value >= bound]
    chosen = pick(RECORDS, turned, f"best:val_bpb:decode_ms={bound!r}")
    assert chosen == min(above, key=lambda r: r.objectives["val_bpb"].value)


def test_by_number_name_and_arch_id() -> None:
    assert pick(RECORDS, SETTINGS, "5").trial == 5
    assert pick(RECORDS, SETTINGS, "gemma3").trial == 1
    assert pick(RECORDS, SETTINGS, RECORDS[7].arch_id).trial == 7
    shortest = next(n for n in range(1, 13) if sum(r.arch_id.startswith(RECORDS[8].arch_id[:n]) for r in RECORDS) == 1)
    prefix = RECORDS[8].arch_id[:shortest]
    if not prefix.isdigit():
        assert pick(RECORDS, SETTINGS, prefix).trial == 8


def test_by_its_number_on_the_front_and_what_is_told_of_it() -> None:
    front = build_front(RECORDS, SETTINGS)
    for point in front.points:
        said = introduce(RECORDS, SETTINGS, point.record)
        assert said.startswith(f"trial {point.record.trial}, ")
        if point.number is None:
            assert said.endswith("not on the front")
        else:
            assert pick(RECORDS, SETTINGS, f"front:{point.number}") == point.record
            assert said.endswith(f"point {point.number} of the front")
    assert introduce(RECORDS, SETTINGS, next(r for r in RECORDS if r.status == "infeasible")).endswith("infeasible")
    n = len(front.members)
    with pytest.raises(ExportError, match=f"front:{n + 1} is no point of the front; expected front:1 to front:{n}"):
        pick(RECORDS, SETTINGS, f"front:{n + 1}")


def test_of_several_trials_of_one_architecture_the_trained_one() -> None:
    copies = [r for r in RECORDS if r.status == "duplicate"]
    assert copies
    for copy in copies:
        assert pick(RECORDS, SETTINGS, copy.arch_id).trial == copy.copy_of


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("best:val_bbp", "'val_bbp' is no objective of this run; expected one of decode_ms, val_bpb. Did you mean"),
        ("best:", "'' is no objective of this run"),
        ("best:val_bpb:decod_ms=3", "'decod_ms' is no objective of this run; .* Did you mean 'decode_ms'"),
        ("best:val_bpb:decode_ms=fast", "the bound is 'fast'; expected a number of ms such as 5 or 5 ms"),
        ("best:val_bpb:decode_ms", "the bound is ''; expected a number of ms"),
        ("best:val_bpb:decode_ms=0.1", r"no point has decode_ms <= 0.1 ms; the nearest is trial \d+ with "),
        ("kne", "nothing of this run is called 'kne'; expected one of .*knee.*Did you mean 'knee'"),
        ("gemma", "Did you mean 'gemma3'"),
        ("", "nothing of this run is called ''"),
        ("999", "nothing of this run is called '999'"),
        ("-1", "nothing of this run is called '-1'"),
    ],
)  # fmt: skip
def test_what_there_is_instead(how: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        pick(RECORDS, SETTINGS, how)


def test_names_are_quoted_since_they_may_hold_commas() -> None:
    repeat = record(9, architecture(["full"], ["dense"]), name="transformer, seed 1", repeat_of="transformer")
    with pytest.raises(ExportError, match=r"expected one of 'gemma3', .*'transformer', 'transformer, seed 1', best:"):
        pick([*RECORDS, repeat], SETTINGS, "999")
    assert pick([*RECORDS, repeat], SETTINGS, "transformer, seed 1") is repeat


def test_the_beginning_of_several_arch_ids() -> None:
    some = [record(i, architecture(["full"], ["dense"]), arch_id=f"abc{i}") for i in range(7)]
    with pytest.raises(ExportError, match=r"'abc' begins 7 arch_ids: abc0, abc1, abc2, abc3, abc4, \.\.\."):
        pick(some, SETTINGS, "abc")
    assert pick(some, SETTINGS, "abc3").trial == 3


def test_nothing_to_pick_from() -> None:
    refused = infeasible(0, "rule", "count(full) >= 1 is false: 0 >= 1").model_copy(update={"architecture": {}})
    with pytest.raises(ExportError, match="no trial of this run is complete"):
        pick([refused], SETTINGS, "knee")
    with pytest.raises(ExportError, match="trial 0 has no architecture: count"):
        pick([refused], SETTINGS, "0")
