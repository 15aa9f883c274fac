"""The contract tests pass a sound plug-in and catch every way in which one is broken here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import spaces
from example_plugin import ffn, one_file
from example_plugin import objective as example_objective
from example_plugin.one_file import EMA
from example_plugin.spec import Average

from archsearch.architecture import Block, ModelSpec, parse_ffn, parse_mixer
from archsearch.contract import ModuleCall, Site
from archsearch.errors import ExportError
from archsearch.export import export_model
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.testing import FFNContract, MixerContract, common

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MIXERS, "_loaded", {})
    monkeypatch.setitem(MIXERS.table, "average", "example_plugin.spec:Average")
    monkeypatch.setitem(MIXERS.table, "ema", "example_plugin.one_file:EMA")
    monkeypatch.setattr(FFNS, "_loaded", {})
    monkeypatch.setitem(FFNS.table, "reglu", "example_plugin.ffn:ReGLU")


class TestPlugin(MixerContract):
    variants = (Average(),)


class TestFFNInOneFile(FFNContract):
    variants = ({"kind": "reglu"}, {"kind": "reglu", "expand": 1})


class TestPluginInOneFile(MixerContract):
    variants = ({"kind": "ema"}, {"kind": "ema", "expand": 2})


@pytest.mark.parametrize(
    ("flaw", "caught_by"),
    [
        ("looks ahead", "test_causality"),
        ("mixes rows", "test_rows_of_a_batch_are_independent"),
        ("mixes documents", "test_documents_are_isolated"),
        ("forgets", "test_decode_is_forward"),
        ("remembers", "test_eval_is_pure_and_train_runs"),
        ("dead weight", "test_gradients_reach_everything"),
        ("uninitialised", "test_initialisation_fills_everything"),
        ("not saved", "test_state_dict_carries_everything"),
        ("widens", "test_bfloat16"),
        ("miscounted", "test_num_params"),
        ("half the flops", "test_flops"),
        ("state in the model's dtype", "test_state_bytes"),
    ],
)
def test_contract_catches(flaw: str, caught_by: str) -> None:
    with pytest.raises(AssertionError):
        getattr(MixerContract(), caught_by)(Average(flaw=flaw))


def test_contract_refuses_a_module_that_leans_on_archsearch() -> None:
    class Leaning(Average):
        def call(self, site: Site) -> ModuleCall:
            return ModuleCall("archsearch.model:DecodeState")

    with pytest.raises(AssertionError, match=r"model:DecodeState uses archsearch\.model\.DecodeState"):
        MixerContract().test_module_can_be_exported(Leaning())


def test_contract_refuses_a_module_that_reaches_its_own_spec() -> None:
    class Reaching(EMA):
        def call(self, site: Site) -> ModuleCall:
            return ModuleCall("example_plugin.one_file:EMA")

    with pytest.raises(ExportError, match="cannot be exported"):
        MixerContract().test_module_can_be_exported(Reaching())


def test_contract_refuses_a_spec_that_imports_torch_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(EMA):  # its module is elsewhere
        def call(self, site: Site) -> ModuleCall:
            return ModuleCall("example_plugin.module:Average", {"d_model": site.d_model})

    Slow.__module__ = one_file.__name__

    class Checked(MixerContract):
        variants = (Slow(),)

    with pytest.raises(AssertionError, match=r"importing example_plugin\.one_file imports torch"):
        Checked().test_specs_need_no_torch()
    monkeypatch.setattr(common, "_is_ours", lambda module: True)  # a built-in family has no such licence

    class BuiltIn(MixerContract):
        variants = (EMA(),)

    with pytest.raises(AssertionError, match=r"importing example_plugin\.one_file imports torch"):
        BuiltIn().test_specs_need_no_torch()


def test_contract_says_why_no_width_fits() -> None:
    class Picky(Average):
        def check(self, site: Site) -> None:
            raise ValueError(f"not at {site.d_model}")

    with pytest.raises(AssertionError, match=r"not at 64.*not at 256"):
        MixerContract().site(Picky())


def test_a_plugin_in_one_file_is_exported(tmp_path: Path) -> None:
    dense = parse_ffn({"kind": "swiglu", "expand": 2})
    block = Block(parse_mixer({"kind": "ema", "expand": 2}), dense)
    export_model(ModelSpec(64, 64, 257, (block, block)), tmp_path / "out", weights="init", name="exported")
    code = (tmp_path / "out" / "model.py").read_text()
    assert "class EMAMixer(nn.Module):" in code
    assert not {"MixerSpec", "ModuleCall", "example_plugin"} & set(re.findall(r"\w+", code))


def installed(folder: Path, groups: dict[str, dict[str, str]]) -> None:
    """The one-file plug-ins as an installed package `my-mixers` with these entry points."""
    for name, module in {"my_mixers": one_file, "my_ffns": ffn, "my_objectives": example_objective}.items():
        (folder / f"{name}.py").write_text(Path(module.__file__).read_text())
    info = folder / "my_mixers-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-mixers\nVersion: 1\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))


def checked(
    folder: Path, kind: str, channels: str = "swiglu", objective: str = "state_bytes"
) -> subprocess.CompletedProcess[str]:
    """`archsearch check` of a space with one mixer of that kind and this FFN, where the package is installed."""
    space = folder / "space.yaml"
    text = spaces.TINY.replace("{kind: attention, head_dim: 16, window: 1/4 context}", f"{{kind: {kind}}}")
    text = text.replace("kind: swiglu", f"kind: {channels}").replace("{name: state_bytes}", f"{{name: {objective}}}")
    space.write_text(text)
    command = [sys.executable, "-m", "archsearch", "check", str(space), "--json"]
    path = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=False)


def test_the_entry_points_that_contributing_shows(tmp_path: Path) -> None:
    """A package that is installed as CONTRIBUTING says brings a `kind` like any other."""
    (snippet,) = re.findall(r"```toml\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    groups = tomllib.loads(snippet)["project"]["entry-points"]
    assert set(groups) == {"archsearch.mixers", "archsearch.ffns", "archsearch.objectives"}
    installed(tmp_path, groups)
    done = checked(tmp_path, "ema", channels="reglu", objective="active_bytes, limit: 2 MiB")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    done = checked(tmp_path, "ema")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exact"]
    done = checked(tmp_path, "emma")
    assert done.returncode == 2
    assert "Did you mean 'ema'?" in done.stderr


def test_entry_points_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    installed(tmp_path, {"archsearch.mixers": {"wrong": "my_mixers:EAM", "lost": "my_mixer:EMA"}})
    done = checked(tmp_path, "wrong")
    assert done.returncode == 2
    assert "space.yaml:9: mixers.swa.kind 'wrong', a plug-in of my-mixers (archsearch.mixers), cannot be" in done.stderr
    assert "loaded from my_mixers:EAM: my_mixers has no EAM. Did you mean 'EMA'?" in done.stderr
    done = checked(tmp_path, "lost")
    assert done.returncode == 2
    assert "cannot be loaded from my_mixer:EMA: No module named 'my_mixer'" in done.stderr


def test_a_plug_in_that_lacks_a_formula_is_told_which(tmp_path: Path) -> None:
    installed(tmp_path, {"archsearch.mixers": {"ema": "my_mixers:EMA"}})
    file = tmp_path / "my_mixers.py"
    file.write_text(file.read_text().replace("def num_params", "def params").replace("def flops", "def n_flops"))
    done = checked(tmp_path, "ema")
    assert done.returncode == 2
    assert "cannot be loaded from my_mixers:EMA: EMA does not define flops, num_params" in done.stderr
