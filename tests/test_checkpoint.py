"""A training that stops, is written to a file and goes on in another process is the training that never stopped."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import example_training
import pytest
import torch
from example_training import ExampleCorpus, example_model, example_settings, example_spec
from safetensors.torch import save_file

from archsearch import checkpoint as checkpoints
from archsearch import train as training
from archsearch.checkpoint import Checkpoint
from archsearch.errors import RunError
from archsearch.model import build_model
from archsearch.train import train

ATTENTION = {"kind": "attention", "head_dim": 16}
ARCHITECTURES = {
    "attention": example_spec(ATTENTION, ATTENTION),
    "untied": example_spec({**ATTENTION, "qk_norm": True, "window": 4}, ATTENTION, tie_embeddings=False),
    "shared": example_spec(ATTENTION, ATTENTION, ATTENTION, shared_ffn=True),
    "experts": example_spec(ATTENTION, {"kind": "short_conv"}, ffn={"kind": "moe", "n_experts": 4, "expand": 1}),
    "balanced": example_spec(
        {"kind": "gated_deltanet", "head_dim": 16},
        {"kind": "mamba2", "head_dim": 16, "d_state": 8},
        ffn={"kind": "moe", "n_experts": 4, "expand": 1, "routing": "sigmoid", "bias_rate": 0.1},
    ),
}


def _train(spec: Any, **options: Any) -> Checkpoint:
    return train(example_model(spec), spec, ExampleCorpus(), example_settings(), device="cpu", **options).checkpoint


def _assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Every architecture trained for 5 of 12 steps here, and to the end in one other process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths: list[str] = []
    for name, spec in ARCHITECTURES.items():
        checkpoints.save(folder / f"{name}.safetensors", _train(spec, until_tokens=5 * 64))
        paths += [str(folder / f"{name}.safetensors"), str(folder / f"{name}.end.safetensors")]
    subprocess.run([sys.executable, "-W", "error", example_training.__file__, "cpu", *paths], check=True)
    return {name: checkpoints.load(folder / f"{name}.end.safetensors") for name in ARCHITECTURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_going_on_in_another_process_is_bit_equal(name: str, continued: dict[str, Checkpoint]) -> None:
    whole = _train(ARCHITECTURES[name])
    _assert_equal(continued[name], whole)
    assert continued[name].progress.step == 12
    assert continued[name].progress.curve == whole.progress.curve
    assert len(whole.progress.curve) == 12


def test_what_is_saved_on_the_way_changes_nothing_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SHARE", 0)
    saved: list[int] = []

    def save(standing: Checkpoint) -> None:
        saved.append(standing.progress.step)
        checkpoints.save(tmp_path / f"{saved[-1]}.safetensors", standing)

    spec = ARCHITECTURES["balanced"]
    whole = _train(spec, save=save, save_seconds=0.0)
    assert saved == list(range(1, 12)), "the last step's is the result's"
    _assert_equal(whole, _train(spec))
    gone_on = _train(spec, resume=checkpoints.load(tmp_path / "7.safetensors"))
    _assert_equal(gone_on, whole)
    assert gone_on.progress.curve == whole.progress.curve


def test_saving_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved = 0.0, []
    monkeypatch.setattr(training.time, "monotonic", lambda: now)

    def step(*_: object) -> None:
        nonlocal now
        now += 1.0

    def save(standing: Checkpoint) -> None:
        nonlocal now
        now += 0.25
        saved.append(standing.progress.step)

    _train(ARCHITECTURES["attention"], on_step=step, save=save, save_seconds=2.0)
    assert saved == [2, 7], "two seconds after the start, then twenty times as long as saving took"


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    saved = _train(ARCHITECTURES["untied"], until_tokens=3 * 64)
    checkpoints.save(tmp_path / "new" / "a.safetensors", saved)
    loaded = checkpoints.load(tmp_path / "new" / "a.safetensors")
    _assert_equal(loaded, saved)
    assert replace(loaded, tensors={}) == replace(saved, tensors={})


def test_tied_and_shared_weights_are_stored_once() -> None:
    spec = ARCHITECTURES["shared"]
    state = _train(spec, until_tokens=64).model_state()
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in build_model(spec).parameters())
    assert not {"head.weight", "blocks.1.ffn.down_proj.weight"} & state.keys()


def test_the_wrong_training_is_refused_and_the_error_says_why() -> None:
    stopped = _train(ARCHITECTURES["attention"], until_tokens=64)
    good: dict[str, Any] = {"spec": stopped.spec, "settings": stopped.settings, "corpus_sha256": stopped.corpus_sha256}
    stopped.check(**good)
    for changed, message in (
        ({"spec": ARCHITECTURES["untied"]}, "its architecture is [0-9a-f]{12} and not [0-9a-f]{12}"),
        ({"settings": example_settings(lr=1e-3)}, "its train.lr is 0.004 and not 0.001"),
        ({"corpus_sha256": "f" * 64}, "its corpus has sha256 [0-9a-f]{12} and not f{12}"),
    ):
        with pytest.raises(RunError, match=f"cannot go on from this checkpoint: {message}"):
            stopped.check(**{**good, **changed})


def test_names_of_mixers_are_no_part_of_the_architecture() -> None:
    stopped = _train(ARCHITECTURES["attention"], until_tokens=64)
    renamed = tuple(replace(block, mixer_name="full") for block in stopped.spec.blocks)
    stopped.check(replace(stopped.spec, blocks=renamed), stopped.settings, stopped.corpus_sha256)


def test_train_refuses_another_corpus() -> None:
    stopped = _train(ARCHITECTURES["attention"], until_tokens=64)
    with pytest.raises(RunError, match="sha256"):
        train(
            example_model(stopped.spec),
            stopped.spec,
            ExampleCorpus(seed=1),
            stopped.settings,
            device="cpu",
            resume=stopped,
        )


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(RunError, match=r"a\.safetensors: cannot read this checkpoint"):
        checkpoints.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(RunError, match="not a checkpoint of archsearch"):
        checkpoints.load(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"archsearch": '{"format": 99}'})
    with pytest.raises(RunError, match="checkpoint of format 99; this version reads format 1"):
        checkpoints.load(path)
    checkpoints.save(path, _train(ARCHITECTURES["attention"], until_tokens=64))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="cannot read this checkpoint"):
        checkpoints.load(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    stopped = _train(ARCHITECTURES["attention"], until_tokens=64)
    checkpoints.save(path, stopped)
    before = path.read_bytes()

    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(path, stopped)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
