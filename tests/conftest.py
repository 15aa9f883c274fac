"""One CPU thread a test; Triton interpreted where there is no GPU; a device that breaks takes one test along."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # shapes are tiny and two processes test: thread pools would fight

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    import triton_interpreter  # noqa: F401  (mends it before anything imports triton)

    os.environ["ARCHSEARCH_KERNELS"] = "reference"  # the interpreter is for the tests of kernels only


@pytest.fixture(autouse=True)
def kernels_in_their_own_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/ops runs kernels wherever they can run: in the interpreter too."""
    if request.path.parent.name == "ops":
        monkeypatch.setenv("ARCHSEARCH_KERNELS", "auto")


if ON_GPU:

    @pytest.fixture(autouse=True)
    def device_survives() -> Iterator[None]:
        """After an illegal access nothing works in this process: end it, so that the next test gets another."""
        yield
        try:
            torch.cuda.synchronize()
        except RuntimeError as problem:
            print(f"the device broke: {problem}")
            os._exit(13)
