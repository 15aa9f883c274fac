"""Which implementation runs, who may choose, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch

from archsearch_kernels import dispatch
from archsearch_kernels.dispatch import runs_kernel, using
from archsearch_kernels.packing import seq_idx_of

X = torch.zeros(1)


class FakeCuda:
    """A tensor that claims to be on a GPU."""

    device = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._missing.cache_clear()
    dispatch._say_once.cache_clear()
    monkeypatch.delenv("ARCHSEARCH_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    yield
    dispatch._missing.cache_clear()


def test_the_cpu_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not runs_kernel("gla", X)
    assert runs_kernel("gla", FakeCuda())  # type: ignore[arg-type]


def test_the_argument_goes_before_the_context_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runs_kernel("gla", X)
    monkeypatch.setenv("ARCHSEARCH_KERNELS", "reference")
    assert not runs_kernel("gla", X)
    with using("triton"):
        assert runs_kernel("gla", X)
        assert not runs_kernel("gla", X, implementation="reference")
        with using("reference"):
            assert not runs_kernel("gla", X)
        assert runs_kernel("gla", X)


def test_an_unsupported_shape_falls_back_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not runs_kernel("gla", FakeCuda(), "K is 513, more than 256")  # type: ignore[arg-type]
        assert not runs_kernel("gla", FakeCuda(), "float64")  # type: ignore[arg-type]
    assert [r.message for r in caplog.records] == [
        "gla runs its reference: K is 513, more than 256",
        "gla runs its reference: float64",
    ]


def test_an_old_card_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not runs_kernel("gla", FakeCuda())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: runs_kernel("gla", X, implementation="cuda"),
            "implementation is 'cuda'; expected one of auto, triton",
        ),
        (lambda: runs_kernel("gla", X, "K is 513", "triton"), "gla: the Triton kernel was asked for, but K is 513"),
        (lambda: using("fast").__enter__(), r"using\(\) is 'fast'"),
        (lambda: seq_idx_of(torch.zeros(2, 2), 4), "cu_seqlens is torch.float32"),
    ],
)
def test_mistakes_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_KERNELS", "on")
    with pytest.raises(ValueError, match="ARCHSEARCH_KERNELS is 'on'; expected one of auto, triton, reference"):
        runs_kernel("gla", X)


def test_documents_are_numbered() -> None:
    assert seq_idx_of(torch.tensor([0, 3, 4, 9]), 9).tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2]]
