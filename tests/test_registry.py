"""Plug-ins: what is found under a name, and what is said of one that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest
from spaces import TINY
from study_tools import run_study

from archsearch import registry
from archsearch.check import check_space
from archsearch.contract import Site
from archsearch.errors import SpaceError, UserError
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.mixers.short_conv import ShortConv
from archsearch.objectives import OBJECTIVES
from archsearch.space import SearchSpace

Install = Callable[..., None]
SWA = "{kind: attention, head_dim: 16, window: 1/4 context}"


class Plain:
    """No spec."""


class Other(ShortConv):
    """Entered under another name than its kind's."""

    kind: Literal["other"] = "other"  # type: ignore[assignment]


class Lost(ShortConv):
    """A spec that does not know its own size."""

    kind: Literal["lost"] = "lost"  # type: ignore[assignment]

    def num_params(self, site: Site) -> int:
        raise KeyError("width")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Names things as an installed package would: install("archsearch.mixers", name="module:attribute")."""

    def made(group: str, **values: str) -> None:
        points = {name: EntryPoint(name, value, group) for name, value in values.items()}
        monkeypatch.setattr(registry, "_plugins", lambda asked: points if asked == group else {})
        for known in (MIXERS, FFNS, OBJECTIVES):
            monkeypatch.setattr(known, "_loaded", {})

    return made


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:A", r"cannot be loaded from no_such_module:A: No module named 'no_such_module'$"),
        (f"{__name__}:Plane", r"has no Plane. Did you mean 'Plain'\?"),
        (f"{__name__}:Plain", r"Plain is no MixerSpec; inherit archsearch.contract.MixerSpec$"),
        (f"{__name__}:Other", r"Other has kind 'other'; kind and entry point must have one name$"),
        ("example_plugin.objective:ACTIVE_BYTES", "ACTIVE_BYTES is no MixerSpec"),
    ],
)
def test_what_a_plugin_lacks_is_said_with_its_line(install: Install, value: str, message: str) -> None:
    install("archsearch.mixers", mine=value)
    with pytest.raises(SpaceError, match=rf"space.yaml:9: mixers.swa.kind 'mine', a plug-in .*{message}"):
        SearchSpace.from_text(TINY.replace(SWA, "{kind: mine}"))


def test_a_plugin_takes_no_name_of_ours_and_that_is_said_once(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("archsearch.mixers", attention=f"{__name__}:Other")
    registry._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert MIXERS.names().count("attention") == 1
        MIXERS.names()
    assert [record.message for record in caplog.records] == [
        "'attention', a plug-in (archsearch.mixers), is not used: it is a mixer of archsearch"
    ]
    assert MIXERS.load("attention").__name__ == "Attention"


def test_a_spec_that_fails_is_named(install: Install) -> None:
    install("archsearch.mixers", lost=f"{__name__}:Lost")
    with pytest.raises(UserError, match="kind lost: num_params failed with KeyError: 'width'"):
        check_space(SearchSpace.from_text(TINY.replace(SWA, "{kind: lost}")))


def test_an_objective_of_a_package_is_read_limited_and_recorded(install: Install, tmp_path: Path) -> None:
    install("archsearch.objectives", active_bytes="example_plugin.objective:ACTIVE_BYTES")
    text = TINY.replace("{name: state_bytes}", "{name: active_bytes, limit: 1 GiB}")
    space = SearchSpace.from_text(text)
    assert check_space(space).n_passed
    study, _ = run_study(space, tmp_path / "run")
    for record in study.folder.records():
        if record.status == "complete":
            assert record.objectives["active_bytes"].value == 4 * record.metrics["active_params_target"]
    with pytest.raises(SpaceError, match=r"active_bytes .* is beyond the limit 1 KiB"):
        check_space(SearchSpace.from_text(text.replace("1 GiB", "1 KiB")))


def test_an_objective_that_is_none_is_refused(install: Install) -> None:
    install("archsearch.objectives", mine=f"{__name__}:Plain")
    with pytest.raises(SpaceError, match=r"Plain is no archsearch.objectives.Objective"):
        SearchSpace.from_text(TINY.replace("{name: state_bytes}", "{name: mine}"))
