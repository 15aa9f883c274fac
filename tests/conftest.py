"""One CPU thread a test; Triton interpreted where there is no GPU; a device that breaks takes one test along."""

from __future__ import annotations

import fcntl
import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO

os.environ.setdefault("OMP_NUM_THREADS", "1")  # shapes are tiny and two processes test: thread pools would fight

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    import triton_interpreter  # noqa: F401  (mends it before anything imports triton)

    os.environ["ARCHSEARCH_KERNELS"] = "reference"  # the interpreter is for the tests of kernels only


def pytest_collection_finish() -> None:
    """The objects of torch and of the tests themselves stay: no later collection need look through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def kernels_in_their_own_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/ops runs kernels wherever they can run: in the interpreter too."""
    if request.path.parent.name == "ops":
        monkeypatch.setenv("ARCHSEARCH_KERNELS", "auto")


if ON_GPU:
    REAL_SIZES = 4  # tests that may run at a time: their references take gigabytes

    @pytest.fixture(autouse=True)
    def room_on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
        """Tests named test_real_... queue for the device's memory, and no process keeps any between tests."""
        with _one_of(REAL_SIZES) if request.node.name.startswith("test_real_") else nullcontext():
            yield
        gc.collect()
        torch.cuda.empty_cache()

    @contextmanager
    def _one_of(n: int) -> Iterator[None]:
        """Hold one of n locks that all test processes of this machine share."""
        folder = Path(tempfile.gettempdir())
        with ExitStack() as stack:
            files = [stack.enter_context((folder / f"archsearch-test-{i}.lock").open("w")) for i in range(n)]
            while not any(_locks(file) for file in files):
                time.sleep(0.05)
            yield

    def _locks(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @pytest.fixture(autouse=True)
    def device_survives() -> Iterator[None]:
        """After an illegal access nothing works in this process: end it, so that the next test gets another."""
        yield
        try:
            torch.cuda.synchronize()
        except RuntimeError as problem:
            print(f"the device broke: {problem}")
            os._exit(13)
