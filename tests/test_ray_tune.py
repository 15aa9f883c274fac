"""A space inside Ray Tune: what the sampler is told, a state that survives, and the example as it is written."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra archsearch[ray] is not installed", allow_module_level=True)

from test_ray import ENVIRONMENT, REAL

import archsearch
from archsearch.errors import RunError
from archsearch.ray_tune import SpaceSearcher, tune_search_space
from archsearch.space import SearchSpace

ROOT = Path(__file__).parent.parent
SPACE = SearchSpace.from_text(REAL)


def states(searcher: SpaceSearcher) -> list[str]:
    return [trial.state.name for trial in searcher.journal.study.get_trials(deepcopy=False)]


def test_the_sampler_learns_how_each_trial_ended() -> None:
    searcher = tune_search_space(SPACE).searcher
    for trial in ("complete", "stopped", "failed", "nan"):
        assert searcher.suggest(trial)["arch_id"]
    whole = {"val_bpb": 2.0, "decode_ms": 1.0, "tokens": 8192, "budget_tokens": 8192}
    searcher.on_trial_complete("complete", whole)
    searcher.on_trial_complete("stopped", {**whole, "tokens": 2048})
    searcher.on_trial_complete("failed", None, error=True)
    searcher.on_trial_complete("nan", {**whole, "val_bpb": float("nan")})
    told = [t for t in searcher.journal.study.get_trials(deepcopy=False) if t.state.name != "FAIL"]  # known candidates
    assert [trial.state.name for trial in told] == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    assert told[0].values == [2.0, 1.0]
    assert [trial.constraints.get("runs") for trial in told] == [0.0, None, 1.0, 1.0]


def test_known_and_refused_candidates_cost_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.ray_tune.MAX_FRUITLESS", 60)
    text = REAL + "rules: ['mixer[0] == swa']\n"
    searcher = tune_search_space(SearchSpace.from_text(text)).searcher
    found = [searcher.suggest(str(i)) for i in range(2)]
    assert len({one["arch_id"] for one in found}) == 2  # all there are
    assert searcher.suggest("3") == "FINISHED"


@pytest.mark.parametrize("way", ["file", "pickle"])
def test_the_state_survives(way: str, tmp_path: Path) -> None:
    searcher = tune_search_space(SPACE).searcher
    first = searcher.suggest("a")
    if way == "file":
        searcher.save(str(tmp_path / "state"))
        again = tune_search_space(SPACE).searcher
        again.restore(str(tmp_path / "state"))
    else:
        again = pickle.loads(pickle.dumps(searcher))
    again.on_trial_complete("a", {"val_bpb": 2.0, "decode_ms": 1.0, "tokens": 8192, "budget_tokens": 8192})
    assert states(again) == ["COMPLETE"]
    assert {again.suggest(str(i))["arch_id"] for i in range(3)}.isdisjoint({first["arch_id"]})


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("{}")
    with pytest.raises(RunError, match="is not the state of a space's searcher"):
        tune_search_space(SPACE).searcher.restore(str(tmp_path / "state"))


def test_a_param_space_beside_it_is_refused() -> None:
    searcher = tune_search_space(SPACE).searcher
    assert searcher.set_search_properties(None, None, {})
    assert not searcher.set_search_properties(None, None, {"lr": 1})


def test_the_example(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("state query key value window block\n" * 2000)
    (tmp_path / "space.yaml").write_text(REAL)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "ray_tune.py"), "space.yaml", "--trials", "2"],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, "RAY_ADDRESS": "local"},  # not the cluster of another test
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "val_bpb" in line and "decode_ms" in line]
    assert len(lines) >= 2
    results = tmp_path / "runs" / "tune" / "space"
    assert list(results.glob("*/events.out.tfevents.*")), "TensorBoard has nothing to show"
    assert list(results.glob("*/checkpoint_*/trial.safetensors"))


def test_named_devices_are_not_for_tune() -> None:
    named = SearchSpace.from_text(REAL.replace("{name: decode_ms}", "{name: decode_ms, at: {device: H100}}"))
    with pytest.raises(RunError, match="to be measured on H100, which Tune cannot arrange; use archsearch launch"):
        tune_search_space(named)


def test_it_is_found_at_the_top() -> None:
    assert archsearch.tune_search_space is tune_search_space
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = archsearch.nothing
