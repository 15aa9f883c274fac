"""The command line in process: what each command prints, as text and as JSON; how fast it starts."""

import json
import subprocess
import sys
from pathlib import Path

import example_run
import pytest
import yaml
from spaces import TINY, WIDE

from archsearch.cli import main
from archsearch.recipes import recipe_names


@pytest.fixture
def space(tmp_path: Path) -> str:
    (tmp_path / "space.yaml").write_text(TINY)
    return str(tmp_path / "space.yaml")


def test_check_prints_findings(space: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", space]) == 0
    assert "8 distinct" in capsys.readouterr().out
    assert main(["check", space, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["distinct_architectures"] == 8
    assert found["smallest"]["target"]["n_blocks"] == 8


def test_mistakes_are_printed_with_their_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(WIDE.replace("kind: attention, head_dim: 64, kv_groups: 2", "kind: atention"))
    assert main(["check", str(tmp_path / "bad.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: bad.yaml:12: mixers.gqa.kind is 'atention'")


def test_show_draws_text_svg_and_json(space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", space, "--scale", "target"]) == 0
    out = capsys.readouterr().out
    assert "target scale" in out
    assert "swa (attention)" in out
    assert main(["show", space, "--svg", str(tmp_path / "a.svg")]) == 0
    svg = (tmp_path / "a.svg").read_text()
    assert svg.startswith("<svg ")
    assert svg.count("<rect") == 1 + 3 + 2 * 4  # ground, embed, norm, head, and two a block
    capsys.readouterr()
    assert main(["show", space, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["model"]["blocks"]) == 4


def test_options_that_would_be_ignored_are_refused(
    space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = example_run.write(tmp_path / "runs" / "toy").path
    assert main(["show", space, "--pick", "knee"]) == 2
    assert "--pick chooses a trial of a run, and " in capsys.readouterr().err
    assert main(["show", str(run), "--seed", "0"]) == 2
    assert "--seed draws a candidate of a space; of a run, --pick says which trial" in capsys.readouterr().err


LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "space.yaml", "--svg", "nodir/a.svg"], "nodir/a.svg: No such file or directory"),
        (["show", "space.yaml", "--svg", "folder"], "folder: Is a directory"),
        (["show", LONG], f"{LONG}: File name too long"),
        (["check", LONG], f"{LONG}: File name too long"),
        (["front", LONG], f"{LONG}: File name too long"),
        (["launch", "space.yaml", "--run-dir", "space.yaml"], "run folder is to be space.yaml/tiny: name a"),
        (["tune", "--import", "folder"], "folder: Is a directory"),
        (["data", "pack", "text.txt", "-o", "space.yaml/x"], "space.yaml/x: "),
        (["export", "runs/toy", "--pick", "0", "--init", "-o", "space.yaml/x"], "space.yaml"),
    ],
)
def test_paths_that_cannot_be_used_are_named(
    space: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("some words, again and again\n" * 500)
    example_run.write(tmp_path / "runs" / "toy")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err


def test_a_run_is_found_from_its_space_its_parent_and_its_name(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    expected = "space.yaml is a file; expected a run folder. If it is a space, "
    later = "launched, its run lies in runs/tiny, or where --run-dir says\n"
    assert said("front", "space.yaml") == f"error: {expected}{later}"
    for name in ("tiny", "jamba"):
        example_run.write(tmp_path / "runs" / name)
    for command in (["front"], ["report"], ["export", "-o", "out"]):
        hint = f"its run is runs/tiny: archsearch {command[0]} runs/tiny\n"
        assert said(command[0], "space.yaml", *command[1:]) == f"error: {expected}{hint}"
        inside = "runs is not a run folder, it holds some; name one of them: runs/jamba, runs/tiny\n"
        assert said(command[0], "runs", *command[1:]) == f"error: {inside}"
    assert said("front", "jamba") == "error: jamba is not a run folder. Did you mean 'runs/jamba'?\n"
    (tmp_path / "notes.txt").write_text("[1, 2")
    assert said("front", "notes.txt").startswith("error: notes.txt is a file; expected a run folder.")


def test_edges_across_depth_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TINY.replace("{choice: [1, 3]}", "1").replace("{choice: [even, first]}", "even")
    (tmp_path / "space.yaml").write_text(text + "share: {kv: {span: 2}, weights: {ffn: dense}}\n")
    assert main(["show", str(tmp_path / "space.yaml"), "--svg", str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").read_text().count("<path") == 2 + 3
    assert main(["show", str(tmp_path / "space.yaml")]) == 0
    assert "kv of 1, ffn weights of 0" in capsys.readouterr().out


def test_recipes_are_listed_printed_and_used_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipe_names())
    assert main(["recipes", "jamba"]) == 0
    assert capsys.readouterr().out.startswith("archsearch: 1\nname: jamba\n")
    assert main(["show", "jamba", "--scale", "target"]) == 0
    assert "4x(4xmamba full mamba mamba mamba) | 16x(dense moe)" in capsys.readouterr().out


def test_data_pack_says_what_it_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("some words, again and again\n" * 500)
    assert main(["data", "pack", str(tmp_path / "text.txt"), "-o", str(tmp_path / "packed"), "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert packed["vocab_size"] == 257
    assert (tmp_path / "packed" / "train.bin").exists()
    assert main(["data", "pack", str(tmp_path / "packed")]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "in a space" in line]
    assert yaml.safe_load(told.partition("in a space ")[2]) == {"task": {"corpus": str(tmp_path / "packed")}}
    assert main(["data", "pack", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_help_and_check_load_nothing_heavy(space: str) -> None:
    for command in (["--help"], ["check", space], ["recipes"], ["front", "nowhere"]):
        code = (
            "import sys, contextlib\nfrom archsearch.cli import main\n"
            f"with contextlib.suppress(SystemExit):\n    main({command!r})\n"
            "found = {'torch', 'optuna', 'ray', 'matplotlib', 'networkx'} & set(sys.modules)\n"
            "assert not found, found"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_unknown_commands_and_missing_arguments_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["serch"], ["export", "runs/x"], []):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage: archsearch" in capsys.readouterr().err
