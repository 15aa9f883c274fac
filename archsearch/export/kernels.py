"""Triton kernels in exported code: an operation hands over to its kernel, and one small file says where kernels are.

`--kernels installed` takes them from archsearch_kernels if it can be imported, `vendored` from a copy beside the model
(`export.vendor`), `none` leaves plain torch. The code of the model is the same for the first two.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from archsearch.export.closure import KERNELS
from archsearch.export.imports import GLUE
from archsearch.export.source import Edit, Source, apply
from archsearch.export.specialise.tidy import layout

Kernels = Literal["none", "installed", "vendored"]


@cache
def operations() -> Mapping[str, str]:
    """The module of every operation that has a kernel, by its name."""
    found: dict[str, str] = {}
    package = find_spec(KERNELS)
    assert package is not None
    assert package.submodule_search_locations is not None
    for part in pkgutil.iter_modules(package.submodule_search_locations):
        path = Path(package.submodule_search_locations[0]) / part.name / "__init__.py"
        if part.ispkg and path.with_name("reference.py").exists():
            names = re.findall(r"(?m)^def ([a-z]\w*)\(", path.read_text())
            found.update(dict.fromkeys(names, f"{KERNELS}.{part.name}"))
    return found


def used(code: str) -> dict[str, str]:
    """Operations of exported code that ask for their kernel, with their modules."""
    asked = set(re.findall(r"\bkernels\.(\w+)\(", code)) - {"kernels_run"}
    return {op: operations()[op] for op in sorted(asked)}


def without_defaults(text: str) -> str:
    """The text with calls of kernels that leave out what the kernel takes by itself."""
    source = Source(text)
    edits = []
    for node in source.nodes(source.tree):
        if isinstance(node, ast.Call) and (op := _op(node)) is not None:
            parameters = inspect.signature(getattr(importlib.import_module(operations()[op]), op)).parameters
            kept = [k for k in node.keywords if k.arg is None or not _is(k.value, parameters[k.arg].default)]
            if len(kept) < len(node.keywords):
                given = [source.segment(argument) for argument in (*node.args, *kept)]
                edits.append(Edit(*source.span(node), f"kernels.{op}({', '.join(given)})"))
    return apply(text, edits)


def _op(node: ast.Call) -> str | None:
    found = node.func
    is_kernel = isinstance(found, ast.Attribute) and isinstance(found.value, ast.Name) and found.value.id == "kernels"
    return found.attr if is_kernel and isinstance(found, ast.Attribute) else None


def _is(node: ast.expr, default: object) -> bool:
    return isinstance(node, ast.Constant) and node.value == default and type(node.value) is type(default)


def glue_code(ops: Mapping[str, str], name: str, way: Kernels, beside: str | None) -> str:
    """Code that finds the kernels of these operations for the model called `name`.

    way: `installed` imports archsearch_kernels, `vendored` the files of `export.vendor`, which lie in the package
    `beside`; None: beside this code, which is a file of a folder for transformers.
    """
    text = files("archsearch.export").joinpath("kernels_template.py").read_text()
    modules: dict[str, list[str]] = {f"{KERNELS}.dispatch": ["kernels_run"]}
    for op, module in ops.items():
        modules.setdefault(module, []).append(op)
    places = {m: m if way == "installed" else f"{beside or ''}.{flat(m)}" for m in sorted(modules)}
    lines = [f"        from {places[m]} import {', '.join(sorted(modules[m]))}\n" for m in sorted(modules)]
    start, end = text.index("        from archsearch_kernels"), text.index("    except ImportError")
    text = text[:start] + "".join(lines) + text[end:]
    every = ", ".join(f"{name}={name}" for names in modules.values() for name in names)
    found = "    return SimpleNamespace(kernels_run=kernels_run, swiglu=swiglu)\n"
    text = text.replace(found, layout(found.replace("kernels_run=kernels_run, swiglu=swiglu", every)))
    whose = KERNELS if way == "installed" else beside or "this folder"
    text = text.replace("NAME", name).replace("WHOSE", whose)
    if beside is None:
        text = text.replace("import logging\n", "", 1).replace("from torch import Tensor\n", HUB_LOGGING, 1)
        text = text.replace("logging.getLogger(__name__)", "logging.get_logger(__name__)")
    return text


HUB_LOGGING = "from torch import Tensor\nfrom transformers.utils import logging\n"


def flat(module: str) -> str:
    """`archsearch_kernels.delta_rule.chunk` in a folder without subfolders: `kernels_delta_rule_chunk`."""
    return "_".join(["kernels", *module.split(".")[1:]])


def with_glue(text: str, glue: str) -> str:
    """One file of both: the model's code, and behind its imports the code that finds the kernels."""
    glue = glue.partition('"""\n\n')[2]
    source = Source(glue)
    last = [node for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)][-1]
    imports, body = (source.text[at] for at in _split_at(source, last))
    source = Source(text)
    last = [node for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)][-1]
    start, rest = (source.text[at] for at in _split_at(source, last))
    imports = imports.replace("from __future__ import annotations\n", "")
    start = re.sub(rf"(?m)^from {GLUE} import .*\n", "", start)
    return start + imports + "\n" + body.strip("\n") + "\n\n\n" + rest.lstrip("\n")


def _split_at(source: Source, node: ast.stmt) -> tuple[slice, slice]:
    assert node.end_lineno is not None
    end = source.line_span(node.end_lineno, node.end_lineno)[1]
    return slice(0, end), slice(end, None)


def said_in_card(ops: Iterable[str], way: Kernels, place: str) -> str:
    """What a card says of kernels, which vendored lie at `place`; empty if the code has none."""
    listed = ", ".join(ops)
    if not listed:
        return ""
    where = "where archsearch_kernels can be imported" if way == "installed" else f"({place})"
    told = f"On CUDA these run as Triton kernels {where}: {listed}. Elsewhere torch computes"
    return textwrap.fill(f"{told}, and so it does everywhere with ARCHSEARCH_KERNELS=reference.", 120)
