"""What is shipped."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_what_it_should_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"archsearch", "archsearch_kernels"}
    for needed in (
        "archsearch/py.typed",
        "archsearch_kernels/py.typed",
        "archsearch_kernels/tuned/nvidia-h100-80gb-hbm3.json",
        "archsearch_kernels/tuned/nvidia-h200.json",
        "archsearch/report/style.css",
        "archsearch/report/hover.js",
        "archsearch/search_spaces/quickstart.yaml",
        "archsearch/search_spaces/recipes/jamba.yaml",
    ):
        assert needed in names
    shipped = {name for name in names if name.endswith(".py")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "archsearch").rglob("*.py")}
    sources |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels/archsearch_kernels").rglob("*.py")}
    assert shipped == sources
    assert not [name for name in names if "/runs/" in name or "/tests/" in name]


def test_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "archsearch", "--help"], capture_output=True, text=True, check=True)
    for command in ("launch", "check", "show", "front", "report", "export", "recipes", "data"):
        assert command in done.stdout
