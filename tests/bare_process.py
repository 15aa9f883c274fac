"""A process that knows neither this project nor the network, as a machine of somebody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("archsearch", "archsearch_kernels"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Nothing())
"""


def run_bare(code: str, *arguments: object, cache: Path, path: str | None = None) -> str:
    """Run Python code in a process that knows neither this project nor the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "HF_HOME": str(cache)}
    if path is not None:
        environment["PYTHONPATH"] = path
    command = [sys.executable, "-P", "-B", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cache)
    assert done.returncode == 0, done.stderr
    return done.stdout
