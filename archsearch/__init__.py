"""Search hybrid LLM layouts for quality against latency on your hardware."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`archsearch.tune_search_space`, loaded when it is asked for: Ray takes a second."""
    if name != "tune_search_space":
        raise AttributeError(f"module 'archsearch' has no attribute {name!r}")
    try:
        return importlib.import_module("archsearch.ray_tune").tune_search_space
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ImportError("tune_search_space needs Ray Tune: pip install 'archsearch[ray]'") from error
