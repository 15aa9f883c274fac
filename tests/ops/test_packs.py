"""The shipped packs: every row is of a kernel as it stands now and was checked; on its GPU each is checked again."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE

import archsearch_kernels
from archsearch_kernels.launch import KERNELS, LAUNCH_OPTIONS, forcing, recording
from archsearch_kernels.tuner.identity import code_hash, device
from archsearch_kernels.tuner.known_bad import is_known_bad
from archsearch_kernels.tuner.lookup import PACKS, pack
from archsearch_kernels.tuner.search import MAX_SPILLS
from archsearch_kernels.tuner.store import frozen, winners
from archsearch_kernels.tuner.workload import distance

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"

for module in pkgutil.walk_packages(archsearch_kernels.__path__, "archsearch_kernels."):
    if ".kernels" in module.name:
        importlib.import_module(module.name)


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


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("module", sorted(path.stem for path in (BENCHMARKS / "cases").glob("*.py")))
def test_every_tuned_configuration_is_right(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pack of this GPU says of a benchmark's launches, forced at a ragged size: outputs and gradients."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    case = importlib.import_module("case")
    rows = pack(PACKS / f"{device().slug}.json")
    tuned = {(row.kernel, row.code, row.dtypes, row.flags, row.bucket): dict(row.config) for row in rows}
    for one in importlib.import_module(f"cases.{module}").CASES:
        torch.manual_seed(0)
        inputs = one.inputs()
        with recording() as made:
            case.step(one, one.run, inputs)()
        del inputs
        keys = [(x.key.kernel, code_hash(x.kernel.python), x.key.dtypes, x.key.flags, x.key.bucket) for x in made]
        configs = {(k[0], frozen(tuned[k])): tuned[k] for k in keys if k in tuned}
        del made
        torch.cuda.empty_cache()
        small = one.small()
        expected = case.results(one, one.reference, small)
        for (name, _), config in configs.items():
            with forcing(name, config):
                got, again = (case.results(one, one.run, small) for _ in range(2))
            for what, value in expected.items():
                assert distance(got[what], value) <= one.tolerance, (one.name, name, config, what)
                assert torch.equal(got[what], again[what]), (one.name, name, config, what)
