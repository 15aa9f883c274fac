"""What the tests of operations share for as long as they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_checks import end_compilers


@pytest.fixture(autouse=True, scope="session")
def compilers_end_with_the_tests() -> Iterator[None]:
    yield
    end_compilers()
