"""Copies of the kernels that a model needs, for a folder without subfolders: `--kernels vendored`.

transformers fetches the files of a model one by one, along `from .file import name`, and nothing from subfolders. So
every module of archsearch_kernels that the operations reach becomes a file `kernels_<...>.py`, with its imports
rewritten and the rest left as it is: what was measured for a kernel's code holds for the copy.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from archsearch import __version__
from archsearch.errors import ExportError
from archsearch.export.closure import KERNELS
from archsearch.export.kernels import flat
from archsearch.export.source import SCOPES, Edit, Source, apply, bound_names

LOOKUP = f"{KERNELS}.tuner.lookup"
WIDTH = 120
WHY = "  # transformers would not load the model at all where this is missing"
NOT_EVERYWHERE = ("triton", "fcntl")  # packages that a model must load without
NOT_KEPT_OF_ROWS = ("p20_us", "p80_us", "n", "registers", "spills", "shared", "error", "note", "date")
LIBRARY = '''"""The name under which torch knows the operators: each copy of this code has its own, so none meet."""

from __future__ import annotations

import hashlib

LIBRARY = "archsearch_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]
'''
SHIPPED = '''def shipped() -> dict[str, list[Row]]:
    """The measurements that come along, by device."""
    rows: dict[str, list[Row]] = {}
    for line in MEASURED.splitlines():
        row = Row.from_json(line)
        rows.setdefault(row.device.slug, []).append(row)
    return rows
'''


def vendored(modules: Iterable[str]) -> dict[str, str]:
    """Files by name that make these operations, with what was measured for their kernels and the licence."""
    reached = reachable([*modules, f"{KERNELS}.dispatch"])
    texts = {f"{flat(module)}.py": _copied(module) for module in reached}
    kernels = {name for module in reached for name in re.findall(KERNEL_NAME, _text(module))}
    texts["kernels_library.py"] = _notice("a generated name") + LIBRARY
    texts["kernels_measured.py"] = _notice("tuned/*.json") + _measured(kernels)
    texts["LICENSE.kernels"] = _licence()
    return texts


def write_package(modules: Iterable[str], folder: Path) -> None:
    """The same as a package of its own, for a model that is one file."""
    folder.mkdir()
    write_files(modules, folder)
    (folder / "__init__.py").write_text('"""Triton kernels of the model beside this folder."""\n')


def write_files(modules: Iterable[str], folder: Path) -> None:
    """Write them into a folder."""
    for name, text in vendored(modules).items():
        (folder / name).write_text(text)


KERNEL_NAME = r"(?m)^@kernel\((?:.|\n)*?^@triton\.jit\b.*\n(?:@.*\n)*def (\w+)\("


def reachable(modules: Iterable[str]) -> list[str]:
    """Modules of archsearch_kernels that these import, at once or later, and they themselves; sorted."""
    found: set[str] = set()
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            for node in ast.walk(ast.parse(_text(module))):
                if isinstance(node, ast.ImportFrom) and _is_ours(node):
                    todo += [_module_of(node, alias) or str(node.module) for alias in node.names]
    return sorted(found - {KERNELS})


def _is_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == KERNELS


def _module_of(node: ast.ImportFrom, alias: ast.alias) -> str | None:
    """The module that `from package import name` means, None if the name is not one."""
    name = f"{node.module}.{alias.name}"
    return name if _path(name) is not None else None


@cache
def _copied(module: str) -> str:
    return _Copy(module).text()


@cache
def _path(module: str) -> Path | None:
    package = find_spec(KERNELS)
    assert package is not None
    assert package.origin is not None
    base = Path(package.origin).parent.joinpath(*module.split(".")[1:])
    options = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in options if path.is_file()), None)


@cache
def _text(module: str) -> str:
    path = _path(module)
    if path is None:
        raise ExportError(f"{module} has no Python source, so its kernels cannot be copied; use --kernels installed")
    return path.read_text()


@dataclass
class _Import:
    """One `from archsearch_kernels...` statement, and the part of the file in which its names hold."""

    node: ast.ImportFrom
    scope: ast.AST


class _Copy:
    """One module, rewritten."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.source = Source(_text(module))
        self.edits: list[Edit] = []
        self.needs: dict[str, str] = {}  # generated names, and the files they come from

    def text(self) -> str:
        """The file."""
        for found in self._imports():
            self._rewrite(found)
        self._name_operators()
        if self.module == LOOKUP:
            self._ship_measurements()
        self._guard()
        text = re.sub(r"\n{3,}(?=from |import |try:)", "\n\n", apply(self.source.text, self.edits))
        place = self.module.replace(".", "/")
        return (
            _notice(f"{place}{'/__init__' if (_path(self.module) or Path()).name == '__init__.py' else ''}.py") + text
        )

    def _imports(self) -> Iterator[_Import]:
        for node in self.source.nodes(self.source.tree):
            if _is_ours(node):
                assert isinstance(node, ast.ImportFrom)
                scope: ast.AST = node
                while not isinstance(scope, (*SCOPES, ast.Module)):
                    scope = self.source.parents[scope]
                yield _Import(node, scope)

    def _rewrite(self, found: _Import) -> None:
        """Names are imported from the flat file; a module's own name becomes the names that are used of it."""
        margin = " " * found.node.col_offset
        lines: list[str] = []
        names = [alias for alias in found.node.names if _module_of(found.node, alias) is None]
        if names:
            told = [a.name if a.asname is None else f"{a.name} as {a.asname}" for a in names]
            lines.append(_import_line(margin, flat(str(found.node.module)), told))
        for alias in found.node.names:
            module = _module_of(found.node, alias)
            if module is not None:
                told = self._used_of(alias.asname or alias.name, found.scope)
                lines += [_import_line(margin, flat(module), told)] if told else []
        span = self.source.line_span(found.node.lineno, found.node.end_lineno or found.node.lineno)
        self.edits.append(Edit(*span, "".join(lines)))

    def _used_of(self, module: str, scope: ast.AST) -> list[str]:
        """`a`, or `a as module_a` where `a` means something else here, of every `module.a` in the scope."""
        found: dict[str, str] = {}
        for node in self.source.nodes(scope):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
                taken = self._taken
                own = f"{module.lstrip('_')}_{node.attr.lstrip('_')}" if node.attr in taken else node.attr
                assert own == node.attr or own not in taken, f"{self.module}: {own}"
                found[node.attr] = own
                self.edits.append(Edit(*self.source.span(node), own))
        others = [n for n in self.source.nodes(scope) if isinstance(n, ast.Name) and n.id == module]
        parents = [self.source.parents[n] for n in others]
        assert all(isinstance(p, ast.Attribute) for p in parents), f"{self.module} passes the module {module} on"
        return [name if name == own else f"{name} as {own}" for name, own in sorted(found.items())]

    @cached_property
    def _taken(self) -> set[str]:
        """Every name that the module binds anywhere."""
        tree = self.source.tree
        top = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        top |= {
            n.id for s in tree.body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        local = (bound_names(n) for n in self.source.nodes(tree) if isinstance(n, SCOPES))
        return top.union(*local)

    def _name_operators(self) -> None:
        """`archsearch::name`, an operator that torch knows, gets a library of its own."""
        for node in self.source.nodes(self.source.tree):
            if isinstance(node, ast.Constant) and str(node.value).startswith("archsearch::"):
                start, end = self.source.span(node)
                new = self.source.text[start:end].replace('"archsearch::', 'f"{LIBRARY}::', 1)
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.archsearch":
                (start, end), new = self.source.span(node), "getattr(torch.ops, LIBRARY)"
            else:
                continue
            self.edits.append(Edit(start, end, new))
            self.needs["LIBRARY"] = "kernels_library"

    def _guard(self) -> None:
        """Imports that are not to be had everywhere, in `try`, behind all others; and the generated names."""
        source = self.source
        for owner, block in source.blocks:
            rare = [node for node in block if _is_rare(node)]
            spans = {node: source.line_span(node.lineno, node.end_lineno or node.lineno) for node in rare}
            margin = " " * rare[0].col_offset if rare else ""
            body = "".join("    " + source.text[start:end] for start, end in spans.values())
            tried = f"{margin}try:{WHY}\n{body}{margin}except ImportError:\n{margin}    raise\n" if rare else ""
            self.edits += [Edit(*span, "") for span in list(spans.values())[1:]]
            if isinstance(owner, ast.Module):
                added = "".join(f"from .{file} import {name}\n" for name, file in self.needs.items())
                last = [node for node in block if isinstance(node, ast.Import | ast.ImportFrom)][-1]
                at = source.line_span(last.lineno, last.end_lineno or last.lineno)[1]
                self.edits += [Edit(*span, "") for span in list(spans.values())[:1]]
                self.edits.append(Edit(at, at, added + ("\n" if tried else "") + tried))
            elif rare:
                self.edits.append(Edit(*spans[rare[0]], tried))

    def _ship_measurements(self) -> None:
        """The packs are files, which no loader brings along; the copy has them as text."""
        for node in self.source.tree.body:
            span = self.source.line_span(*self.source.statement_lines(node))
            if isinstance(node, ast.FunctionDef) and node.name == "shipped":
                self.edits.append(Edit(*span, SHIPPED))
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKS":
                self.edits.append(Edit(*span, ""))
        self.needs["MEASURED"] = "kernels_measured"


def _import_line(margin: str, file: str, names: list[str]) -> str:
    line = f"{margin}from .{file} import {', '.join(names)}\n"
    if len(line) <= WIDTH + 1:
        return line
    return f"{margin}from .{file} import (\n" + "".join(f"{margin}    {name},\n" for name in names) + f"{margin})\n"


def _is_rare(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level == 0 and (node.module or "").partition(".")[0] in NOT_EVERYWHERE
    return isinstance(node, ast.Import) and any(a.name.partition(".")[0] in NOT_EVERYWHERE for a in node.names)


def _measured(kernels: set[str]) -> str:
    """The rows of the shipped packs about these kernels, as text in a module."""
    from archsearch_kernels.tuner.lookup import shipped

    lines = []
    for rows in shipped().values():
        for row in rows:
            if row.kernel in kernels:
                data: Mapping[str, object] = json.loads(row.to_json())
                lines.append(json.dumps({name: value for name, value in data.items() if name not in NOT_KEPT_OF_ROWS}))
    assert not any("\\" in line or '"""' in line for line in lines)
    text = "\n".join(lines)
    first = "What was measured of the kernels: the best configuration for a launch on a GPU, a line each."
    return f'"""{first}"""\n\nMEASURED = """\\\n{text}\n"""\n'


def _notice(place: str) -> str:
    return f"# From archsearch {__version__}, {place}. SPDX-License-Identifier: Apache-2.0 (see LICENSE.kernels)\n"


def _licence() -> str:
    """The text of the licence, from the source tree or from where archsearch is installed."""
    path = Path(__file__).parents[2] / "LICENSE"
    if path.is_file():
        return path.read_text()
    for file in metadata.files("archsearch") or ():
        if file.name == "LICENSE":
            return file.read_text()
    raise ExportError("the licence of archsearch_kernels is not installed with it; use --kernels installed")
