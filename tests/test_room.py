"""What a model takes at least is what its tensors take; without room for it a trial ends at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from spaces import TINY

from archsearch.architecture import ModelSpec
from archsearch.choosers import RandomChooser
from archsearch.latency import room
from archsearch.latency.lock import DeviceLock
from archsearch.latency.measure import Bench
from archsearch.latency.room import bench_bytes, too_big, train_bytes
from archsearch.model import build_model
from archsearch.settings import Train
from archsearch.space import SearchSpace
from archsearch.train import make_optimizer
from archsearch.trial import run_trial


@pytest.fixture
def model() -> ModelSpec:
    return SearchSpace.from_text(TINY.replace("float32", "bfloat16")).sample(RandomChooser(0)).architecture.at("target")


def test_measuring_takes_at_least_the_weights_and_the_states(model: ModelSpec) -> None:
    with Bench(model) as bench:
        weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
        states = bench.state_bytes(context=100, batch=3)
        assert bench_bytes(model, "decode_ms", 100, 3) == weights + states
        assert bench_bytes(model, "somebodys_own", 100, 3) == weights
        assert bench_bytes(model, "decode_ms", 100, 3) <= bench.peak_memory(context=100, batch=3)
        stepping = bench.peak_memory(context=100, batch=3, work="train_step")
        assert bench_bytes(model, "train_step_ms", 100, 3) == 4 * weights <= stepping


def test_training_takes_at_least_weights_gradients_and_moments(model: ModelSpec) -> None:
    built = build_model(model)
    optimizer = make_optimizer(built, Train())
    built(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    held = [*built.parameters(), *(p.grad for p in built.parameters())]
    held += [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert train_bytes(model) == sum(t.numel() * t.element_size() for t in held if t is not None)


def job(model_text: str, **changes: Any) -> dict[str, Any]:
    space = SearchSpace.from_text(model_text)
    candidate = space.sample(RandomChooser(0))
    made: dict[str, Any] = {
        "job": 0,
        "architecture": candidate.architecture.to_json(),
        "train": {},
        "task": {},
        "goals": [goal.model_dump(mode="json", exclude_defaults=True) for goal in space.objectives],
        "base_dir": None,
        "corpus_sha256": None,
        "device": "cpu",
        "repeats": 3,
        "until_tokens": 4096,
        "checkpoint": None,
        "keep": False,
        "timed": False,
    }
    return made | changes


def test_a_trial_without_room_ends_at_once_and_says_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr("archsearch.trial.Bench", lambda *given, **options: pytest.fail("a model was built"))
    monkeypatch.setattr("archsearch.trial.build_model", lambda *given, **options: pytest.fail("a model was built"))
    monkeypatch.setattr("archsearch.machine.free_memory", lambda: 3 << 10)
    timed = TINY.replace("state_bytes", "decode_ms")
    for text, what in ((timed, "decode_ms at target scale ("), (TINY, "training at proxy scale (")):
        outcome = run_trial(job(text), lambda data: None)
        assert (outcome["status"], outcome["reason"]) == ("infeasible", "out_of_memory")
        assert outcome["message"].startswith(what)
        assert outcome["message"].endswith("iB and the device has 3 KiB")


def test_a_card_is_asked_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 2 << 10

    monkeypatch.setattr("archsearch.trial.DeviceLock", lambda device: DeviceLock("cpu"))
    monkeypatch.setattr("archsearch.trial._device_name", lambda device: device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    outcome = run_trial(job(TINY.replace("state_bytes", "decode_ms"), device="cuda:0"), lambda data: None)
    assert outcome["reason"] == "out_of_memory"
    assert outcome["message"].endswith("and the device has 2 KiB")


def test_the_sentence(model: ModelSpec) -> None:
    assert too_big(model, "decode_ms at target scale", 103_200_000_000, 23 << 30) == (
        f"decode_ms at target scale ({room.si(room.cost.params(model))} parameters, bfloat16) takes at least 96.1 GiB "
        "and the device has 23 GiB"
    )
