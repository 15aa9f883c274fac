"""What a measurement holds for: the GPU, the compiler, and the kernel's code."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import subprocess
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from archsearch_kernels.assembler import prefer_a_sound_one


@dataclass(frozen=True)
class Device:
    """A kind of GPU: two cards with equal fields share their measurements."""

    name: str
    capability: str  # "9.0"
    processors: int
    l2_bytes: int
    shared_bytes: int  # most that a program may have
    memory_gib: int

    @property
    def slug(self) -> str:
        """A file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Compiler:
    """Versions of Triton and of the assembler it calls."""

    triton: str
    ptxas: str


@cache
def device(index: int | None = None) -> Device:
    """The CUDA device `index`, the current one by default."""
    p: Any = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return Device(
        name=p.name,
        capability=f"{p.major}.{p.minor}",
        processors=p.multi_processor_count,
        l2_bytes=p.L2_cache_size,
        shared_bytes=getattr(p, "shared_memory_per_block_optin", 232_448),
        memory_gib=round(p.total_memory / 2**30),
    )


@cache
def compiler() -> Compiler:
    """The Triton of this process; its bundled ptxas, or the one that TRITON_PTXAS_PATH names."""
    import triton
    from triton import knobs

    if torch.cuda.is_available():
        prefer_a_sound_one(torch.cuda.get_device_capability())
    path = knobs.nvidia.ptxas.path if hasattr(knobs, "nvidia") else str(Path(triton.__file__).parent / "ptxas")
    found = re.search(r"V(\d+[\d.]*)", subprocess.run([path, "--version"], capture_output=True, text=True).stdout)
    return Compiler(triton.__version__, found[1] if found else "unknown")


@cache
def code_hash(function: Any) -> str:
    """12 hex digits of a kernel's code and that of every jitted helper it calls, without comments and docstrings.

    function: the Python function under `@triton.jit`. Constants of its module that it reads count as well.
    """
    digest = hashlib.sha256()
    for text in sorted(_texts(function, {})):
        digest.update(text.encode())
    return digest.hexdigest()[:12]


def _texts(function: Any, seen: dict[int, str]) -> list[str]:
    if id(function) in seen:
        return list(seen.values())
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    definition.decorator_list = []
    seen[id(function)] = ast.unparse(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name):
            continue
        value = function.__globals__.get(node.id)
        inner = getattr(value, "fn", None)
        if inspect.isfunction(inner) and inner.__module__.partition(".")[0] != "triton":
            _texts(inner, seen)
        elif isinstance(value, int | float | str) or type(value).__name__ == "constexpr":
            seen[hash((id(function), node.id))] = f"{node.id} = {getattr(value, 'value', value)!r}"
    return list(seen.values())
