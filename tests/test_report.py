"""The front that the report is made of: membership, ties, volume, files, honesty. From a run folder alone."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import example_run
import numpy as np
import pytest
from example_run import settings, trial

from archsearch import pareto
from archsearch.report import build_front, summary, write_report
from archsearch.report.front import front_csv, front_json, progress
from archsearch.report.plot import make_plot
from archsearch.report.trust import against, certificate
from archsearch.store import Measured, TrialRecord


@pytest.fixture(scope="module")
def records() -> list[TrialRecord]:
    return example_run.records()


def test_front_is_the_records_front(records: list[TrialRecord]) -> None:
    front = build_front(records, settings())
    complete = [r for r in records if r.status == "complete"]
    values = np.array([[r.objectives["val_bpb"].value, r.objectives["decode_ms"].value] for r in complete])
    assert {p.record.trial for p in front.members} == {complete[i].trial for i in pareto.front(values)}
    times = [p.record.objectives["decode_ms"].value for p in front.members]
    assert times == sorted(times)
    assert [p.number for p in front.members] == list(range(1, len(times) + 1))
    assert front.n_trials == {"complete": 16, "infeasible": 10, "duplicate": 2}
    worst, best = values.max(axis=0), values.min(axis=0)
    assert list(front.reference.values()) == pytest.approx(list(worst + 0.1 * (worst - best)))
    assert front.hypervolume == pytest.approx(pareto.hypervolume(values, list(front.reference.values())))
    assert [p.label for p in front.baselines] == ["transformer", "gemma3", "qwen3-next"]


def test_a_goal_to_maximise_is_turned_round() -> None:
    goals = [{"name": "val_bpb", "goal": "max"}, {"name": "decode_ms", "goal": "min"}]
    front = build_front([trial(0, 1, 1), trial(1, 2, 1), trial(2, 3, 2)], settings(objectives=goals))
    assert [p.record.trial for p in front.members] == [1, 2]
    assert front.reference["val_bpb"] == pytest.approx(0.8)
    assert front.reference["decode_ms"] == pytest.approx(2.1)
    assert front.hypervolume == pytest.approx(1.2 * 1.1 + 1.0 * 0.1)


def test_noise_makes_ties_and_chances() -> None:
    front = build_front([trial(0, 1.0, 5.0, 0.1), trial(1, 1.05, 5.05, 0.1), trial(2, 9, 9, 0.1)], settings())
    first, near, far = front.points
    assert first.on_front
    assert near.is_near
    assert not far.is_near
    assert far.probability == 0
    assert first.tied_with == ("arch1",)
    assert near.tied_with == ("arch0",)
    assert far.tied_with == ()
    assert 0.5 < (first.probability or 0) < 1


def test_without_measured_noise_no_chance_is_claimed() -> None:
    front = build_front([trial(0, 1, 5), trial(1, 1.0001, 5)], settings())
    assert [p.probability for p in front.points] == [None, None]
    assert front.points[0].tied_with == ()
    statements = " ".join(certificate(front, settings())["statements"])
    assert "No noise was measured" in statements
    assert "another seed would move it was not measured" in statements


def test_who_may_be_on_the_front_is_named() -> None:
    front = build_front([trial(0, 1.0, 5.0, 0.1), trial(1, 1.05, 5.05, 0.1), trial(2, 9, 9, 0.1)], settings())
    chance = front.points[1].probability
    assert chance is not None
    told = f"Not on the front, but within the noise perhaps so: trial 1 ({chance:.2f}); in brackets the chance."
    assert told in certificate(front, settings())["statements"]


def test_what_the_layout_tells_is_exact_however_many_seeds() -> None:
    axes = [
        {"name": "val_bpb", "goal": "min", "unit": "bits/byte"},
        {"name": "params", "goal": "min", "unit": "parameters"},
    ]
    known = {"name": "base", "objectives": {"val_bpb": Measured(value=1.0), "params": Measured(value=10.0)}}
    again = {"name": "base, seed 1", "repeat_of": "base"}
    other = {"objectives": {"val_bpb": Measured(value=1.2), "params": Measured(value=10.0)}}
    front = build_front(
        [trial(0, 1, 1, **known), trial(1, 1, 1, **other | again), trial(2, 1, 1, **other)], settings(objectives=axes)
    )
    assert front.spreads == {"val_bpb": pytest.approx(0.2 / 2**0.5), "params": 0}
    statements = certificate(front, settings())["statements"]
    assert "params: exact." in statements
    (noise,) = [each for each in statements if each.startswith("val_bpb: measured noise")]
    assert noise.endswith(
        "± 0.14 bits/byte, the standard deviation of one baseline over 2 seeds; from so few the true one may be up to "
        "32 times as large (95%)."
    )


def test_timings_are_as_uncertain_as_one_baseline_measured_twice() -> None:
    def timed(number: int, ms: float, **changes: Any) -> TrialRecord:
        bpb, timing = Measured(value=1.0 + number), Measured(value=ms, spread=0.1, n=5)
        return trial(number, 1, 1, objectives={"val_bpb": bpb, "decode_ms": timing}, **changes)

    again = {"name": "base, seed 1", "repeat_of": "base"}
    other = timed(2, 20.0)
    front = build_front([timed(0, 8.0, name="base"), timed(1, 12.0, **again), other], settings())
    share = 8**0.5 / 10
    assert front.between == {"decode_ms": pytest.approx(share)}
    assert front.spreads["decode_ms"] == pytest.approx(14.0 * share), "the median of 8 and 20, each with its share"
    (told,) = [s for s in certificate(front, settings())["statements"] if s.startswith("decode_ms: measured noise")]
    assert "measured anew with each of its 2 seeds, has a standard deviation of 28%, more than the 5 repeats" in told
    steady = build_front([timed(0, 8.0, name="base"), timed(1, 8.01, **again), other], settings())
    assert not steady.between
    assert steady.spreads["decode_ms"] == 0.1


def test_limits_on_noisy_values_are_owned_up_to() -> None:
    limited = settings(objectives=[goal | {"limit": 4.0} for goal in settings()["objectives"] if goal["unit"] == "ms"])
    noisy, quiet = (trial(k, 1, 5, spread, status="infeasible", reason="limit") for k, spread in ((1, 2.0), (2, 0.1)))
    front = build_front([trial(0, 1, 3), noisy, quiet], limited)
    assert front.refused_noisily == 1
    told = "1 trials were refused by a limit on a noisy value: on a quiet device they might have been within it."
    assert told in certificate(front, limited)["statements"]


def test_a_missing_spread_is_taken_from_its_axis() -> None:
    front = build_front([trial(0, 1.0, 5.0, 0.1), trial(1, 1.05, 5.05, None)], settings())
    assert front.spreads == {"val_bpb": 0.1, "decode_ms": 0.1}
    assert front.points[0].tied_with == ("arch1",)


def test_what_cannot_be_compared_is_left_out_and_said() -> None:
    stopped = trial(2, 0.1, 0.1, status="stopped", rung=0)
    lacking = trial(3, 0.1, 0.1, objectives={"val_bpb": Measured(value=0.1)})
    front = build_front([trial(0, 1, 5, rung=0, name="full"), trial(1, 2, 4, rung=2), stopped, lacking], settings())
    assert [p.record.trial for p in front.points] == [0, 1]
    assert front.left_out == 1
    statements = " ".join(certificate(front, settings())["statements"])
    assert "1 trials were stopped at an earlier rung" in statements
    assert "1 complete trials are not shown" in statements


def test_front_json_says_everything(records: list[TrialRecord]) -> None:
    front = build_front(records, settings())
    data = json.loads(json.dumps(front_json(front, certificate(front, settings())), allow_nan=False))
    assert data["study"] == "linear-sparse-full"
    assert [goal["name"] for goal in data["objectives"]] == ["val_bpb", "decode_ms"]
    assert data["n_trials"] == {"complete": 16, "infeasible": 10, "duplicate": 2}
    assert {p["name"] for p in data["baselines"]} == {"transformer", "gemma3", "qwen3-next"}
    point = next(p for p in data["points"] if p["name"] == "qwen3-next")
    assert point["layout"] == {
        "proxy": "3x(gdn gdn gdn full) | 12xmoe",
        "target": "12x(gdn gdn gdn full) | 48xmoe",
    }
    assert point["objectives"]["decode_ms"].keys() == {"value", "spread", "n"}
    assert point["is_baseline"]
    assert 0 <= point["probability"] <= 1
    assert point["state_bytes_target"] == records[2].metrics["state_bytes_target"]
    assert all(p["on_front"] for p in data["points"])
    trust = data["trust"]
    assert trust["seeds"] == 1
    assert trust["noise"]["val_bpb"] == 0.006
    assert trust["training_tokens"] == 4_000_000
    assert trust["rank_correlation_proxy_to_target"] is None
    assert trust["rank_correlation_half_to_end"]["n"] == 16


def test_odd_numbers_do_not_break_the_files(tmp_path: Path) -> None:
    odd = trial(
        0, 1, 5, metrics={"params_proxy": float("nan"), "params_target": float("inf")}, curve=[(9, float("nan"))]
    )
    odd = odd.model_copy(update={"holes": {"lr": float("inf"), "name": "\u2028"}})
    folder = example_run.write(tmp_path / "runs" / "odd", [odd])
    write_report(folder)
    assert folder.read_json("front.json")["points"][0]["trial"] == 0


def test_rank_correlation_needs_trials_and_finds_order() -> None:
    def learning(number: int, half: float, end: float) -> TrialRecord:
        return trial(number, end, 5, tokens=100, curve=[(45, half), (50, half), (100, end)], metrics={"val_bpb": end})

    few = build_front([learning(i, i + 1, i) for i in range(4)], settings())
    assert certificate(few, settings())["rank_correlation_half_to_end"] is None
    up = build_front([learning(i, i + 1, i) for i in range(6)], settings())
    assert certificate(up, settings())["rank_correlation_half_to_end"] == {"spearman": pytest.approx(1.0), "n": 6}
    down = build_front([learning(i, 10 - i, i) for i in range(6)], settings())
    assert certificate(down, settings())["rank_correlation_half_to_end"]["spearman"] == pytest.approx(-1.0)
    flat = build_front([learning(i, 1, i) for i in range(6)], settings())
    assert certificate(flat, settings())["rank_correlation_half_to_end"] is None


def test_a_window_as_long_as_the_proxy_context_is_named(records: list[TrialRecord]) -> None:
    front = build_front(records, settings())
    assert not any("whole context" in s for s in certificate(front, settings())["statements"])
    arch = example_run.architecture(["swa"], ["dense"])
    arch["proxy"]["context"] = 64
    front = build_front([example_run.record(0, arch)], settings())
    assert any("In 1 of the 1 layouts" in s for s in certificate(front, settings())["statements"])


def test_baselines_are_weighed_against_the_front() -> None:
    found = against(
        build_front(
            [
                trial(0, 1.0, 5.0, 0.01),
                trial(1, 1.005, 10.0, 0.01, name="slow"),
                trial(2, 0.9, 10.0, 0.01, name="good"),
                trial(3, 2.0, 4.0, 0.01),
            ],
            settings(),
        )
    )
    assert found == [
        "slow is beaten by front point 2: val_bpb 1.000 against 1.005, within the noise; "
        "decode_ms 5.000 against 10.00 (2.0x).",
        "good is on the front.",
    ]


def test_front_csv_has_a_row_per_complete_trial(records: list[TrialRecord]) -> None:
    front = build_front(records, settings())
    rows = list(csv.DictReader(io.StringIO(front_csv(front))))
    assert len(rows) == 16
    assert sum(int(row["on_front"]) for row in rows) == len(front.members)
    assert rows[0]["name"] == "transformer"
    assert float(rows[0]["decode_ms"]) == records[0].objectives["decode_ms"].value
    assert rows[3]["layout_target"] == "12x(gdn gdn gdn full) | 48xdense"


def test_csv_cells_are_no_formulas() -> None:
    front = build_front([trial(0, 1, 5, name='=HYPERLINK("http://x")')], settings())
    (row,) = csv.DictReader(io.StringIO(front_csv(front)))
    assert row["name"] == '\'=HYPERLINK("http://x")'


def test_hypervolume_never_falls(records: list[TrialRecord]) -> None:
    front = build_front(records, settings())
    volumes = [volume for _, volume in progress(front)]
    assert volumes == sorted(volumes)
    assert volumes[-1] == pytest.approx(front.hypervolume)


@pytest.mark.parametrize(
    "goals",
    [
        [{"name": "val_bpb", "goal": "min", "unit": "bits/byte"}],
        [*example_run.SETTINGS["objectives"], {"name": "state", "goal": "min", "unit": "bytes", "scale": "target"}],
        [*example_run.SETTINGS["objectives"], {"name": "state", "goal": "max"}, {"name": "speed", "goal": "max"}],
    ],
    ids=["one", "three", "four"],
)
def test_any_number_of_objectives(tmp_path: Path, records: list[TrialRecord], goals: list[dict[str, Any]]) -> None:
    def widen(r: TrialRecord) -> TrialRecord:
        extra = {"state": Measured(value=r.metrics["state_bytes_target"]), "speed": Measured(value=1e5 + r.trial)}
        return r.model_copy(update={"objectives": {**r.objectives, **extra}})

    trials = [widen(r) if r.status == "complete" else r for r in records]
    folder = example_run.write(tmp_path / "runs" / "toy", trials, settings(objectives=goals))
    front = write_report(folder)
    page = (folder.path / "report.html").read_text()
    assert page.count('class="scatter wide"') == {1: 0, 2: 1}.get(len(goals), 3)
    assert len(front.members) >= 1
    assert (folder.path / "front.png").exists() == (len(goals) > 1)
    assert str(front.members[0].record.arch_id) in summary(trials, settings(objectives=goals))


@pytest.mark.parametrize("left", [[], ["failed"], ["one"], ["same", "same"]], ids=str)
def test_small_runs(tmp_path: Path, records: list[TrialRecord], left: list[str]) -> None:
    kinds = {"failed": records[16], "one": records[0], "same": records[3]}
    folder = example_run.write(tmp_path / "runs" / "toy", [kinds[name] for name in left])
    front = write_report(folder)
    has_points = bool(left) and left != ["failed"]
    assert bool(front.members) == has_points
    assert (folder.path / "front.png").exists() == has_points
    assert ("No trial is complete yet" in (folder.path / "report.html").read_text()) != has_points
    assert ("no front yet" in summary(folder.records(), settings())) != has_points
    if left == ["same", "same"]:
        assert len(front.members) == 2


def test_the_page_of_a_big_study_stays_light(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arch = example_run.architecture(["gdn"], ["dense"])
    base = example_run.record(0, arch, curve=[])
    trials = [
        base.model_copy(
            update={
                "trial": i,
                "arch_id": f"{i:012x}",
                "objectives": {
                    "val_bpb": Measured(value=1 + float(a), spread=0.01),
                    "decode_ms": Measured(value=1 + float(b), spread=0.01),
                },
            }
        )
        for i, (a, b) in enumerate(rng.random((1000, 2)) + 0.2)
    ]
    folder = example_run.write(tmp_path / "runs" / "big", [])
    (folder.path / "trials.jsonl").write_bytes(b"".join(trial.to_line() for trial in trials))
    assert len(write_report(folder, with_picture=False).points) == 1000
    assert (folder.path / "report.html").stat().st_size < 1_000_000


def test_a_tokenizer_that_loses_text_is_named_beside_the_front(tmp_path: Path, records: list[TrialRecord]) -> None:
    folder = example_run.write(tmp_path / "runs" / "lossy", records)
    told = folder.read_json("environment.json")
    folder.write_json("environment.json", told | {"tokenizer": {"name": "words", "loss": "tokenizer words loses text"}})
    write_report(folder, with_picture=False)
    assert "tokenizer words loses text." in folder.read_json("front.json")["trust"]["statements"]
    assert "tokenizer words loses text." in (folder.path / "report.html").read_text()
    assert "loses text" not in " ".join(certificate(build_front(records, settings()), settings(), told)["statements"])


def test_everything_shows_the_noise_that_it_reckons_with() -> None:
    def measured(number: int, bpb: float, ms: float, **more: Any) -> TrialRecord:
        read = {"val_bpb": Measured(value=bpb), "decode_ms": Measured(value=ms, spread=0.1, n=20)}
        return trial(number, bpb, ms, objectives=read, **more)

    mine, base = measured(0, 2.0, 10.0), measured(1, 2.02, 20.0, name="base")
    again = measured(2, 2.06, 40.0, name="base, seed 1", repeat_of="base")
    front = build_front([mine, base, again], settings())
    sigma = front.members[0].sigma
    assert sigma["val_bpb"] == pytest.approx(0.0283, abs=1e-4)
    assert sigma["decode_ms"] == pytest.approx(10.0 * 14.142 / 30, abs=1e-2)
    assert "2.00 ± 0.03" in summary([mine, base, again], settings())
    assert "val_bpb 2.000 against 2.020, within the noise" in against(front)[0]
    mark = next(m for m in make_plot(front, front.axes[1], front.axes[0], 980, 520).marks if m.point.record.trial == 0)
    assert mark.x_bar is not None
    assert mark.y_bar is not None


def test_noisy_times_are_marked_wherever_they_are_shown(tmp_path: Path) -> None:
    def timed(number: int, bpb: float, ms: float, spread: float) -> TrialRecord:
        read = {"val_bpb": Measured(value=bpb), "decode_ms": Measured(value=ms, spread=spread, n=20)}
        return trial(number, bpb, ms, objectives=read)

    calm, wild = [timed(0, 2.0, 100.0, 20.0), timed(1, 1.0, 300.0, 1.0)], timed(2, 1.5, 190.0, 145.0)
    assert "noisy" not in summary(calm, settings())
    front = build_front([*calm, wild], settings())
    told = certificate(front, settings())
    assert told["noisy"] == {"val_bpb": [], "decode_ms": [2]}
    assert (
        sum("decode_ms: 1 of 3 values are noisy, with a spread of more than 20%" in s for s in told["statements"]) == 1
    )
    text = summary([*calm, wild], settings())
    assert text.count("190 ± 145 noisy") == 1
    assert text.splitlines()[-1] == "noisy: the spread is more than 20% of the value; measure again"
    folder = example_run.write(tmp_path / "runs" / "toy", [*calm, wild])
    write_report(folder, with_picture=False)
    assert "190 ± 145 noisy" in (folder.path / "report.html").read_text()
    assert json.loads((folder.path / "front.json").read_text())["trust"]["noisy"]["decode_ms"] == [2]


def test_front_json_says_what_was_picked_and_not_what_could_have_been() -> None:
    pattern = {"ratio": {"swa": {"choice": [1, 3]}, "full": 1}, "ends": [{"choice": ["a", {"range": [1, 9]}]}, 5]}
    holes = {
        "layout.mixer": pattern,
        "layout.mixer[1].ratio.swa": 3,
        "layout.mixer[1].ends[0]": {"range": [1, 9]},
        "layout.mixer[1].ends[0][1]": 7,
        "mixers.swa": {"window": {"choice": [64, 128], "per": "block"}},
        "mixers.swa[0].window@0": 64,
        "mixers.swa[0].window@3": 128,
        "train.lr": 0.001,
        "ffns.x": {"kind": {"choice": ["gone"]}},  # nothing says what was picked inside
    }
    front = build_front([trial(0, 1, 5, holes=holes)], settings())
    (point,) = front_json(front, {})["points"]
    assert point["holes"] == {
        **holes,
        "layout.mixer": {"ratio": {"swa": 3, "full": 1}, "ends": [7, 5]},
        "layout.mixer[1].ends[0]": 7,
        "mixers.swa": {"window": [64, 128]},
    }


def test_the_report_needs_neither_torch_nor_a_gpu(tmp_path: Path) -> None:
    folder = example_run.write(tmp_path / "runs" / "toy")
    code = (
        "import sys; from archsearch.store import RunFolder; from archsearch.report import write_report\n"
        "early = [m for m in ('torch', 'matplotlib', 'optuna', 'networkx') if m in sys.modules]\n"
        "sys.modules['torch'] = None\n"  # any import of it fails now
        f"write_report(RunFolder.open({str(folder.path)!r}))\n"
        "print(early, [m for m in ('optuna', 'networkx', 'matplotlib.pyplot') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] []"
    for name in ("front.json", "front.csv", "report.html", "front.png"):
        assert (folder.path / name).stat().st_size > 1000
