"""Imports point one way: every module of archsearch has a row and imports only rows below its own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from archsearch.testing.checks import imports_of

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "archsearch"

# From low to high. A module or package may import what stands in a lower row, and its own parts; nothing beside it.
# Imports inside functions and for types count as well. `__init__` has no row: it names what is public, for types only
# (tests/test_api.py sees that it imports nothing), and of its names others use the version and the place alone.
ROWS: list[set[str]] = [
    {"errors", "quantity", "notation", "machine"},
    {"registry", "contract", "pareto", "store"},
    {"settings", "mixers", "ffns", "modules", "report"},
    {"data", "architecture", "describe"},
    {"graph", "checkpoint", "optimizer"},
    {"cost", "model"},
    {"draw", "latency", "tasks"},
    {"step"},
    {"objectives", "train", "export"},
    {"space", "trial"},
    {"choosers", "doubts", "recipes", "rungs", "runners"},
    {"study", "check", "rehearsal"},
    {"extend", "progress", "kernel_tuning", "launch_ray", "ray_tune"},
    {"launch"},
    {"cli"},
    {"__main__", "testing"},
]
# Likewise within a package whose files have an order.
WITHIN: dict[str, list[set[str]]] = {
    "space": [
        {"yaml_source", "layout", "share", "rules"},
        {"holes"},
        {"explain", "coverage"},
        {"alphabet", "sections"},
        {"fill"},
        {"search_space"},
    ],
}


def ranks(rows: list[set[str]]) -> dict[str, int]:
    """The number of each name's row, from low to high."""
    return {name: row for row, names in enumerate(rows) for name in names}


ROW = ranks(ROWS)

# Who alone may import a library that is slow, optional or has an owner.
OWNERS = {
    "optuna": {"study"},
    "ray": {"runners/ray.py", "runners/ray_cluster.py", "runners/ray_worker.py", "ray_tune"},
    "networkx": {"graph", "draw", "cost", "model", "export"},
}

WITHOUT_TORCH = ["pareto", "store", "report", "settings", "architecture", "cost", "objectives", "space", "check", "cli"]
IMPORT_ALL = """
import importlib, pkgutil, sys
module = importlib.import_module(sys.argv[1])
for part in pkgutil.walk_packages(getattr(module, "__path__", ()), sys.argv[1] + "."):
    importlib.import_module(part.name)
assert "torch" not in sys.modules, f"{sys.argv[1]} imports torch"
"""


def parts(package: Path) -> dict[str, list[Path]]:
    """The files of each module or subpackage directly in `package`."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        found.setdefault(path.relative_to(package).parts[0].removesuffix(".py"), []).append(path)
    return found


def violations(package: Path) -> list[str]:
    """What breaks the rows, one line each."""
    bad, known = [], parts(package)
    for own, paths in known.items():
        if own == "__init__":
            continue
        if own not in ROW:
            bad.append(f"{own} has no row; give it one in ROWS")
        if own in WITHIN:
            without = {path.stem for path in paths} - {"__init__"} - ranks(WITHIN[own]).keys()
            bad += [f"{own}/{part} has no row; give it one in WITHIN" for part in sorted(without)]
        for path in paths:
            for name in sorted(imports_of(path)):
                where = f"{path.relative_to(package)} imports {name}"
                if name.startswith("."):
                    bad.append(f"{where}: write the full name")
                top, target, part, *_ = [*name.split("."), "", ""]
                if top != "archsearch" or own not in ROW:
                    continue
                if target == own:
                    inner = ranks(WITHIN.get(own, []))
                    if path.stem in inner and inner.get(part, len(inner)) >= inner[path.stem]:
                        bad.append(where)
                    continue
                if target in ("", "__version__"):
                    continue
                if ROW.get(target, len(ROWS)) >= ROW[own]:
                    bad.append(where)
    return bad


def trespassers(package: Path) -> list[str]:
    """Files that import a library which belongs to others."""
    bad = []
    for own, paths in parts(package).items():
        for path in paths:
            file = path.relative_to(package).as_posix()
            for library in {name.split(".")[0] for name in imports_of(path)} & set(OWNERS):
                if not {own, file} & OWNERS[library]:
                    bad.append(f"{file} imports {library}")
    return bad


def test_imports_point_down() -> None:
    assert not violations(PACKAGE), "\n".join(violations(PACKAGE))


def test_the_design_note_has_these_rows() -> None:
    text = (ROOT / "docs" / "design" / "0001-the-path-of-data.md").read_text()
    (shown,) = re.findall(r"## Rows of imports\n.*?```\n(.*?)```", text, flags=re.DOTALL)
    packages = [[f"{package}/{part}" for part in sorted(row)] for package, rows in WITHIN.items() for row in rows]
    rows = "".join(" · ".join(row) + "\n" for row in [*map(sorted, ROWS), [], *packages])
    assert shown == rows, f"write this into docs/design/0001:\n{rows}"


def test_libraries_stay_with_their_owners() -> None:
    assert not trespassers(PACKAGE), "\n".join(trespassers(PACKAGE))


def test_the_policy_can_fail(tmp_path: Path) -> None:
    files = {
        "__init__.py": "__version__ = '1'",
        "errors.py": "from archsearch import __version__",
        "graph.py": "from archsearch.architecture import Block\nimport networkx",
        "cost.py": "from archsearch import newcomer",
        "draw.py": "from archsearch import Architecture",
        "architecture.py": "def late():\n    from archsearch.graph import build_graph\n    import optuna",
        "mixers/__init__.py": "from archsearch.mixers.one import One",
        "mixers/one.py": "import archsearch.modules.one",
        "modules/one.py": "from .two import Two",
        "space/holes.py": "from archsearch.space.fill import Fill\nfrom archsearch.space import layout",
        "space/fill.py": "from archsearch.space.holes import Filling\nfrom archsearch.space import Fill",
        "space/late.py": "",
        "study/driver.py": "import optuna",
        "runners/local.py": "import ray",
        "runners/ray.py": "import ray",
        "newcomer.py": "from archsearch.errors import UserError",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == [
        "architecture.py imports archsearch.graph.build_graph",
        "cost.py imports archsearch.newcomer",
        "draw.py imports archsearch.Architecture",
        "mixers/one.py imports archsearch.modules.one",
        "modules/one.py imports .two.Two: write the full name",
        "newcomer has no row; give it one in ROWS",
        "space/late has no row; give it one in WITHIN",
        "space/fill.py imports archsearch.space.Fill",
        "space/holes.py imports archsearch.space.fill.Fill",
    ]
    assert trespassers(tmp_path) == ["architecture.py imports optuna", "runners/local.py imports ray"]


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_runs_without_torch(name: str) -> None:
    command = [sys.executable, "-c", IMPORT_ALL, f"archsearch.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_know_only_each_other() -> None:
    """The exporter copies them; and a module never imports a spec (docs/design/0001)."""
    files = list((PACKAGE / "modules").rglob("*.py"))
    assert files
    for path in files:
        ours = [name for name in imports_of(path) if name.split(".")[0] == "archsearch"]
        assert not [name for name in ours if not name.startswith("archsearch.modules.")], path


def test_kernels_know_nothing_of_archsearch() -> None:
    files = list((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        assert not [name for name in imports_of(path) if name.split(".")[0] == "archsearch"], path


def test_kernels_is_a_folder_and_no_package() -> None:
    """The import name `kernels` belongs to a library that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not spec.origin.startswith(str(ROOT))


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
