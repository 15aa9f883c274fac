"""What a launch shows: what it counts, and numbers written as in the table of the front."""

import io
import json
import re
from pathlib import Path

import pytest
from spaces import TINY
from study_tools import FakeRunner, run_study

from archsearch import progress
from archsearch.progress import JsonProgress, LiveProgress, PlainProgress, shown
from archsearch.report import summary
from archsearch.space import SearchSpace

WIDER = TINY.replace("d_model: 32", "d_model: 128").replace("d_model: 64", "d_model: 256")


def test_the_first_line_names_all_that_is_counted(tmp_path: Path) -> None:
    more = "trials: 4, baselines: [transformer, gemma3], seeds: 3"
    out = io.StringIO()
    run_study(SearchSpace.from_text(WIDER.replace("trials: 4", more)), tmp_path / "run", listener=PlainProgress(out))
    first, *lines = out.getvalue().splitlines()
    assert first.endswith(": 4 candidates, 2 baselines, 2 more seeds of transformer")
    assert len(lines) == 4 + 2 + 2
    assert lines[-1].startswith("[  8/8] trial ")
    out = io.StringIO()
    run_study(SearchSpace.from_text(TINY), tmp_path / "plain", listener=PlainProgress(out))
    assert out.getvalue().splitlines()[0].endswith(": 4 candidates")


def test_numbers_are_written_as_in_the_table(tmp_path: Path) -> None:
    out = io.StringIO()
    space = SearchSpace.from_text(TINY.replace("state_bytes", "params"))
    study, _ = run_study(space, tmp_path / "run", FakeRunner(), PlainProgress(out))
    table = summary(study.folder.records(), study.folder.read_json("settings.json"))
    seen = re.findall(r"params (\S+) ", out.getvalue())
    assert len(seen) == 4
    assert not [value for value in seen if "e+" in value]
    assert any(f" {value} " in table for value in seen)


def test_the_display_fits_where_the_output_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown(as_json=True) as listener:
        assert isinstance(listener, JsonProgress)
        listener.note("a")
    assert json.loads(capsys.readouterr().out) == {"event": "note", "message": "a"}
    with shown(as_json=False) as listener:
        assert isinstance(listener, PlainProgress)
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    with shown(as_json=False) as listener:
        assert isinstance(listener, LiveProgress)
        assert listener.live.is_started
    assert not listener.live.is_started
