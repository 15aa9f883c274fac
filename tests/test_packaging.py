"""What is shipped and what the README promises."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from archsearch.space import SearchSpace

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


def test_the_readmes_space_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert SearchSpace.from_text(text).name == "quickstart"


def test_the_readmes_commands_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) == {"quickstart", "test"} <= targets
    commands = set(re.findall(r"`archsearch (\w+)", README))
    assert commands >= {"check", "show", "launch", "front", "export", "recipes"}
    for command in sorted(commands):
        done = subprocess.run([sys.executable, "-m", "archsearch", command, "--help"], capture_output=True, check=False)
        assert done.returncode == 0, command


def test_the_readmes_tree_is_the_package() -> None:
    tree = README.split("```\narchsearch/\n", 1)[1].split("\nkernels/", 1)[0]
    named = set(re.findall(r"(?:^|\s)([a-z_]+(?:\.py|/))(?=\s)", tree))
    here = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "archsearch").iterdir()}
    assert named == {name for name in here if re.match(r"^[a-z]", name) and name not in ("py.typed",)}


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "archsearch", "--help"], capture_output=True, text=True, check=True)
    for command in ("launch", "check", "show", "front", "report", "export", "recipes", "data"):
        assert command in done.stdout
