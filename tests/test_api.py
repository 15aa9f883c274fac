"""The names that `archsearch` itself offers: all there, typed, and loaded only when they are used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import spaces

import archsearch
from archsearch.model import num_params
from archsearch.space import SearchSpace

PACKAGE = Path(archsearch.__file__).parent
PUBLIC = [name for name in dir(archsearch) if name != "__version__"]


def run(program: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def typed_names() -> dict[str, str]:
    """What type checkers are told: each public name, and the module that it is imported from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    names = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is re-exported as {alias.name} as {alias.name}"
            names[alias.name] = str(node.module)
    return names


def test_every_name_is_what_type_checkers_are_told() -> None:
    told = typed_names()
    assert sorted(told) == sorted(PUBLIC)
    for name, home in told.items():
        if home == "archsearch":
            assert getattr(archsearch, name) is importlib.import_module(f"archsearch.{name}")
        else:
            assert getattr(archsearch, name) is getattr(importlib.import_module(home), name)


def test_a_name_that_a_module_has_is_that_module() -> None:
    """Importing a submodule binds it in the package, and nothing may depend on what was imported before."""
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert {name for name in PUBLIC if name in modules} == {"cost", "draw", "launch"}
    for program in (
        "import archsearch; archsearch.launch; import archsearch.launch",
        "import archsearch.launch",
        "from archsearch import launch; import archsearch",
    ):
        assert run(f"{program}; print(archsearch.launch.launch.__name__, archsearch.launch.Options.__name__)") == (
            "launch Options"
        )


def test_importing_archsearch_imports_nothing() -> None:
    assert run(
        "import sys; before = set(sys.modules); import archsearch; dir(archsearch); "
        "print(*(m for m in set(sys.modules) - before if m.partition('.')[0] not in sys.stdlib_module_names))"
    ) == "archsearch"  # fmt: skip


def test_what_needs_no_torch_does_not_import_it() -> None:
    needing = ["HybridLM", "PlainProgress", "build_model", "export_run", "launch", "tune_search_space"]
    names = [name for name in PUBLIC if name not in needing]
    loads = "; ".join(f"archsearch.{name}" for name in names)
    assert run(f"import archsearch, sys; {loads}; print('torch' in sys.modules)") == "False"


def test_star_takes_all_but_what_needs_ray() -> None:
    program = "from archsearch import *; import sys; print('ray' in sys.modules, *sorted(globals()))"
    with_ray, *names = run(program).split()
    assert with_ray == "False"
    assert set(PUBLIC) - set(names) == {"tune_search_space"}


def test_without_ray_its_name_says_what_to_install() -> None:
    program = "import sys; sys.modules['ray'] = None; import archsearch\ntry: archsearch.tune_search_space\n"
    assert run(program + "except ImportError as error: print(error)") == (
        "tune_search_space needs Ray Tune: pip install 'archsearch[ray]'"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'archsearch' has no attribute 'SearchSpaces'"):
        archsearch.SearchSpaces  # noqa: B018


def test_a_space_says_what_it_is() -> None:
    assert repr(SearchSpace.from_text(spaces.TINY)) == (
        "<SearchSpace tiny: mixers full, swa; ffns dense; objectives val_bpb, state_bytes>"
    )


def test_parameters_count_whether_they_are_trained_or_not() -> None:
    spec = SearchSpace.from_text(spaces.TINY).sample(archsearch.RandomChooser(0)).architecture.at("proxy")
    model = archsearch.build_model(spec)
    before = num_params(model)
    assert before == archsearch.cost.params(spec)
    model.embed.requires_grad_(False)
    assert num_params(model) == before
