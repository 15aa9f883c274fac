"""The shipped packs: every row is of a kernel as it stands now, was checked, and names options that the kernel has."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from archsearch_kernels.launch import KERNELS, LAUNCH_OPTIONS
from archsearch_kernels.tuner.identity import code_hash
from archsearch_kernels.tuner.known_bad import is_known_bad
from archsearch_kernels.tuner.lookup import PACKS, pack
from archsearch_kernels.tuner.search import MAX_SPILLS
from archsearch_kernels.tuner.store import winners

for path in sorted(PACKS.parent.glob("*/kernels.py")):
    importlib.import_module(f"archsearch_kernels.{path.parent.name}.kernels")


@pytest.fixture(params=sorted(PACKS.glob("*.json")), ids=lambda path: path.stem)
def shipped(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_rows_are_of_the_kernels_as_they_are(shipped: Path) -> None:
    rows = pack(shipped)
    assert rows
    for row in rows:
        assert row.device.slug == shipped.stem
        kernel = KERNELS[row.kernel]
        assert row.code == code_hash(kernel.python), f"{row.kernel} has changed: tune again, or drop its rows"
        options = {*inspect.signature(kernel.python).parameters, *LAUNCH_OPTIONS}
        assert {name for name, _ in row.config} <= options


def test_rows_were_checked_and_are_one_a_launch(shipped: Path) -> None:
    rows = pack(shipped)
    for row in rows:
        assert row.verdict == "ok"
        assert row.error is not None
        assert row.median_us is not None
        assert row.spills is not None
        assert row.spills <= MAX_SPILLS
        assert not is_known_bad(row.kernel, dict(row.config), row.device, row.compiler)
    assert len(winners(rows)) == len(rows)
