"""Search hybrid LLM layouts for quality against latency on your hardware.

The names below load when they are first used, so that `import archsearch` takes no time and what needs no torch never
imports it. Where a name and its module are called the same (`launch`, `cost`, `draw`), it is the module:
`archsearch.cost.params(model)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from archsearch import cost as cost
    from archsearch import draw as draw
    from archsearch import launch as launch
    from archsearch.architecture import Architecture as Architecture
    from archsearch.architecture import ModelSpec as ModelSpec
    from archsearch.choosers import RandomChooser as RandomChooser
    from archsearch.export import export_run as export_run
    from archsearch.model import HybridLM as HybridLM
    from archsearch.model import build_model as build_model
    from archsearch.progress import PlainProgress as PlainProgress
    from archsearch.ray_tune import tune_search_space as tune_search_space
    from archsearch.recipes import load_recipe as load_recipe
    from archsearch.recipes import recipe_names as recipe_names
    from archsearch.report import build_front as build_front
    from archsearch.space import Candidate as Candidate
    from archsearch.space import SearchSpace as SearchSpace
    from archsearch.store import RunFolder as RunFolder

__all__ = [
    "Architecture",
    "Candidate",
    "HybridLM",
    "ModelSpec",
    "PlainProgress",
    "RandomChooser",
    "RunFolder",
    "SearchSpace",
    "__version__",
    "build_front",
    "build_model",
    "cost",
    "draw",
    "export_run",
    "launch",
    "load_recipe",
    "recipe_names",
]  # and tune_search_space, which needs Ray: `from archsearch import *` must not

_MODULES = ("cost", "draw", "launch")
_HOMES = {
    "Architecture": "architecture",
    "Candidate": "space",
    "HybridLM": "model",
    "ModelSpec": "architecture",
    "PlainProgress": "progress",
    "RandomChooser": "choosers",
    "RunFolder": "store",
    "SearchSpace": "space",
    "build_front": "report",
    "build_model": "model",
    "export_run": "export",
    "load_recipe": "recipes",
    "recipe_names": "recipes",
    "tune_search_space": "ray_tune",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"archsearch.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'archsearch' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"archsearch.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if name != "tune_search_space" or (error.name or "").partition(".")[0] != "ray":
            raise
        raise ImportError("tune_search_space needs Ray Tune: pip install 'archsearch[ray]'") from error


def __dir__() -> list[str]:
    return sorted([*__all__, "tune_search_space"])
