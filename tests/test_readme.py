"""What the README and its neighbours say is so: files, figures, commands, names, links.

python tests/test_readme.py     writes the output of `archsearch check` anew, after it has changed
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import example_run
import pytest
import yaml

import archsearch
from archsearch import check, cli
from archsearch.errors import SpaceError
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.objectives import OBJECTIVES
from archsearch.recipes import recipe_names
from archsearch.space import SearchSpace

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICKSTART = ROOT / "search_spaces" / "quickstart.yaml"

INLINE = re.findall(r"`(archsearch [^`\n]+)`", README)
SHOWN = re.findall(r"^\$ (archsearch .+)$", README, flags=re.MULTILINE)
COMMANDS = sorted({command.replace(r"\|", "|") for command in [*INLINE, *SHOWN]})
PLACES = {  # what the commands' capitals stand for
    "SPACE": "search_spaces/quickstart.yaml",
    "RUN": "runs/quickstart",
    "NAME": "lfm2",
    "CORPUS": "builtin",
    "ID": "0",
    "DIR": "out",
    "F": "out.svg",
    "N": "2",
    "D": "cpu",
    "A": "auto",
}
QUICK = {"check", "show", "front", "report", "recipes"}  # no training, no device


def block(language: str, start: str) -> str:
    """The code block of the README that begins with `start`."""
    (found,) = re.findall(rf"```{language}\n({re.escape(start)}.*?)\n```", README, flags=re.DOTALL)
    return str(found)


def section(title: str) -> str:
    """A chapter of the README."""
    return re.split(r"^#+ .*\n", README.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """A folder as the README has it in mind: the repository's spaces, and a finished run of the quickstart."""
    (path / "search_spaces").symlink_to(ROOT / "search_spaces")
    example_run.write(path / "runs" / "quickstart")
    with contextlib.chdir(path):
        yield


def spelled_out(command: str) -> list[list[str]]:
    """A command of the README as arguments, all that is optional given and none of it; the first of each `a|b`."""
    forms = [re.sub(r"[\[\]]", " ", command), re.sub(r"\[[^\]]*\]", " ", command)]
    words = [[word.partition("|")[0] for word in shlex.split(form)[1:]] for form in forms]
    return [[PLACES.get(word, word) for word in form] for form in words]


def test_the_readmes_space_is_the_file() -> None:
    """Comments aside: the README explains, the file is run."""
    assert yaml.safe_load(block("yaml", "archsearch: 1")) == yaml.safe_load(QUICKSTART.read_text())


def checked() -> str:
    """What `archsearch check` prints of the quickstart with time for all samples, and none to count further."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "SAMPLE_SECONDS", 1e9)
        patch.setattr(check, "COUNT_SECONDS", 0.0)
        return check.check_space(SearchSpace.load(QUICKSTART)).text()


def test_the_readmes_check_is_what_it_prints() -> None:
    command, _, shown = block("console", "$ archsearch check").partition("\n")
    assert command == "$ archsearch check search_spaces/quickstart.yaml"
    assert checked() == shown, "run: python tests/test_readme.py"


def test_the_readmes_mistake_is_told_so() -> None:
    (shown,) = re.findall(r"`(space\.yaml:12: [^`]+)`", README)
    text = """archsearch: 1
name: mistaken
scales:
  proxy: {n_blocks: 2, d_model: 64, context: 64}
ffns:
  dense: {kind: swiglu}
layout:
  mixer: gqa
  ffn: dense
objectives: [{name: val_bpb}]
mixers:
  gqa: {kind: atention}
"""
    with pytest.raises(SpaceError) as told:
        SearchSpace.from_text(text)
    (message,) = told.value.problems
    start, end = shown.split("…")  # the README leaves most of the known names out
    assert message.startswith(start)
    assert message.endswith(end)


def test_the_commands_are_spelled_as_they_are_understood() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {
        "check", "show", "launch", "tune", "front", "export", "recipes",
    }  # fmt: skip
    for command in COMMANDS:
        for words in spelled_out(command):
            assert not [word for word in words if word.isupper()], f"{command}: what is {words}?"
            try:
                cli._parser().parse_args(words)
            except SystemExit:
                pytest.fail(f"the README's `{command}` is not understood")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] in QUICK])
def test_the_quick_commands_run(command: str, tmp_path: Path) -> None:
    with folder(tmp_path):
        for words in spelled_out(command):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert cli.main(words) == 0, words
            assert out.getvalue().strip(), words


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    text = block("python", "import torch")
    lines = [line for line in text.splitlines() if line]
    names: dict[str, Any] = {}
    out = io.StringIO()
    with folder(tmp_path), contextlib.redirect_stdout(out):
        exec(compile(text, "README.md", "exec"), names)
    assert len(lines) <= 12
    assert names["logits"].shape == (1, 16, 257)
    printed = out.getvalue()
    assert "bytes of decode state" in printed
    assert "'val_bpb'" in printed
    imported = re.findall(r"from archsearch import (.*)", text)[0].split(", ")
    assert set(imported) <= set(dir(archsearch))


def test_the_readmes_launch_is_a_call() -> None:
    (text,) = re.findall(r"`(launch\.launch\(.*?)` searches", README)
    calls = []
    launch = type("launch", (), {"launch": lambda *given: calls.append(given), "Options": archsearch.launch.Options})
    eval(text, {"launch": launch, "space": SearchSpace.load(QUICKSTART), "PlainProgress": archsearch.PlainProgress})
    inspect.signature(archsearch.launch.launch).bind(*calls[0])


def test_the_alphabet_is_the_registrys() -> None:
    text = section("The alphabet")
    rows = re.findall(r"^\| [a-z][^|]*\| (.*) \|$", text, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(MIXERS.table)
    ffns, _, rest = text.partition("FFNs: ")[2].partition("Objectives: ")
    assert sorted(re.findall(r"`(\w+)`", ffns)) == sorted(FFNS.table)
    assert sorted(re.findall(r"`(\w+)`", rest.partition("Others")[0])) == sorted(OBJECTIVES.table)
    recipes = rest.partition("as a start:")[2].partition(".\n")[0].replace("\n", " ").split(",")
    assert sorted(recipe.strip() for recipe in recipes) == recipe_names()
    assert f"lists {['ten', 'eleven', 'twelve'][len(recipe_names()) - 10]} published hybrids" in text


def test_groups_are_the_registries() -> None:
    assert "(`archsearch.mixers`, `.ffns`,\n`.objectives`)" in README
    assert [registry.group for registry in (MIXERS, FFNS, OBJECTIVES)] == [
        "archsearch.mixers", "archsearch.ffns", "archsearch.objectives",
    ]  # fmt: skip


def test_make_has_the_readmes_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) == {"quickstart", "test"} <= targets


def test_the_tree_is_the_package() -> None:
    tree = README.split("```\narchsearch/\n", 1)[1].split("\nkernels/", 1)[0]
    named = re.findall(r"(?:^|\s)([a-z_]+(?:\.py|/))(?=\s)", tree)
    here = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "archsearch").iterdir()}
    assert sorted(named) == sorted(name for name in here if re.match(r"^[a-z]", name) and name != "py.typed")


def test_the_tree_has_every_folder() -> None:
    last = re.search(r"^((?:\w+/ +)+\w+/)\n```", README, flags=re.MULTILINE)
    assert last is not None
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {path.partition("/")[0] + "/" for path in tracked.splitlines() if "/" in path and path[0] != "."}
    assert {"archsearch/", "kernels/", *last[1].split()} == folders


def anchors(document: Path) -> set[str]:
    """The headings of a Markdown file as GitHub links them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", document.read_text()):
        linked = document.parent / target if target else document
        assert linked.exists(), f"{document.name}: {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{document.name}: {target}#{anchor}"


if __name__ == "__main__":
    shown = block("console", "$ archsearch check")
    (ROOT / "README.md").write_text(README.replace(shown, f"{shown.partition(chr(10))[0]}\n{checked()}"))
