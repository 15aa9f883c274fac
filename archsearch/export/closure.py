"""What a class needs to stand alone: its own source and that of every function, class and constant it reaches.

Starting from the roots, names are followed through imports to where they are defined, however many files away.
Imports of torch and the standard library stay imports; everything else is copied. Operations are taken from their
`reference.py`, the plain-torch form; where their package has a kernel too, the copy may begin by asking for it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from archsearch.errors import ExportError
from archsearch.export.imports import GLUE, Imported, import_lines
from archsearch.export.source import SCOPES, Edit, Source, apply, bound_names, global_reads

KERNELS = "archsearch_kernels"

Symbol = tuple[str, str]  # module, name


class Module:
    """One source file and what its top level binds."""

    def __init__(self, name: str, text: str, is_package: bool = False) -> None:
        self.name = name
        self.source = Source(text)
        self.statements: dict[str, ast.stmt] = {}
        self.imports: dict[str, Imported] = {}
        self._package = name if is_package else name.rpartition(".")[0]
        self._index(self.source.tree.body)

    def _index(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.statements[node.name] = node
            elif isinstance(node, ast.Assign):
                self.statements.update((t.id, node) for t in node.targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.statements[node.target.id] = node
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    self.imports[bound] = Imported(alias.name if alias.asname else bound, None)
            elif isinstance(node, ast.ImportFrom):
                origin = "." * node.level + (node.module or "")
                module = importlib.util.resolve_name(origin, self._package)
                self.imports.update((a.asname or a.name, Imported(module, a.name)) for a in node.names)
            elif isinstance(node, ast.If):  # if TYPE_CHECKING
                self._index(node.body)


@lru_cache(maxsize=128)
def _parsed(name: str, text: str, is_package: bool) -> Module:
    return Module(name, text, is_package)


@dataclass(eq=False)
class Definition:
    """One top-level statement to copy, and what the global names in it mean."""

    symbol: Symbol
    node: ast.stmt
    text: str
    copied: dict[str, Symbol] = field(default_factory=dict)
    imported: dict[str, Imported] = field(default_factory=dict)


class Closure:
    """Everything that `roots` reach, in the order in which a reader meets it: what is used before what uses it.

    `written` gives the text of modules that are not on disk as they should be exported (the model's own layout);
    their constants, the sizes of the model, come first of all. `with_kernels`: operations that have a Triton kernel
    hand over to it where it runs (`use_kernels` and `kernels`, imported from GLUE).
    Raises ExportError when something needed has no source or imports a package that is neither torch nor Python's own.
    """

    def __init__(
        self, roots: list[Symbol], written: Mapping[str, str] | None = None, with_kernels: bool = False
    ) -> None:
        self._with_kernels = with_kernels
        self._kernels: dict[Symbol, list[ast.arg]] = {}  # operations, and what their kernels take
        self._modules: dict[str, Module] = {n: Module(n, t) for n, t in (written or {}).items()}
        self._written = frozenset(written or ())
        self._found: dict[Symbol, Definition] = {}
        for root in roots:
            self._reach(self._origin(*root))
        self.definitions = self._ordered([self._origin(*root)[0] for root in roots])

    def text(self) -> str:
        """One module that defines all of it."""
        names = self._names()
        pieces: list[str] = []
        imports: dict[str, Imported] = {}
        previous: ast.stmt | None = None
        for definition in self.definitions:
            for name, imported in definition.imported.items():
                if imports.setdefault(name, imported) != imported:
                    raise ExportError(f"two of the mixers mean different things by {name}: {imports[name]}, {imported}")
            both_constants = isinstance(previous, _ASSIGNMENTS) and isinstance(definition.node, _ASSIGNMENTS)
            text = _renamed(definition, names)
            if definition.symbol in self._kernels:
                text = _asking_for_kernel(text, definition.symbol[1], self._kernels[definition.symbol])
                imports |= {name: Imported(GLUE, name) for name in ("kernels", "use_kernels")}
            pieces += ["" if previous is None else "\n" if both_constants else "\n\n\n", text]
            previous = definition.node
        return "from __future__ import annotations\n\n" + import_lines(imports) + "\n\n" + "".join(pieces) + "\n"

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None or not found.origin.endswith(".py"):
                raise ExportError(f"{name} has no Python source, so models that use it cannot be exported")
            is_package = bool(found.submodule_search_locations)
            self._modules[name] = _parsed(name, Path(found.origin).read_text(), is_package)
        return self._modules[name]

    def _origin(self, module: str, name: str) -> Symbol:
        """Where a name is really defined: follows re-exports, and prefers an operation's reference."""
        if module.startswith(KERNELS + ".") and not module.endswith(".reference"):
            reference = module + ".reference"
            if importlib.util.find_spec(reference) is not None and name in self._module(reference).statements:
                public = self._module(module).statements.get(name)
                if self._with_kernels and isinstance(public, ast.FunctionDef):
                    self._kernels[reference, name] = [*public.args.args, *public.args.kwonlyargs]
                return reference, name
        here = self._module(module)
        if name in here.statements:
            return module, name
        imported = here.imports.get(name)
        if imported is None or imported.name is None or imported.is_kept:
            raise ExportError(f"{module} does not define {name}, so models that use it cannot be exported")
        return self._origin(imported.module, imported.name)

    def _reach(self, symbol: Symbol) -> None:
        if symbol in self._found:
            return
        module = self._module(symbol[0])
        node = module.statements[symbol[1]]
        text = module.source.line_text(*module.source.statement_lines(node)).rstrip("\n")
        definition = self._found[symbol] = Definition(symbol, node, text)
        for name in dict.fromkeys(read.id for read in global_reads(node)):
            if name in module.statements:
                definition.copied[name] = (symbol[0], name)
            elif (imported := module.imports.get(name)) is not None:
                if imported.is_kept:
                    definition.imported[name] = imported
                elif imported.name is None:
                    raise ExportError(f"{symbol[0]} writes `import {imported.module}`; exports need `from ... import`")
                elif importlib.util.find_spec(imported.module.partition(".")[0]) is None:
                    raise ExportError(f"{symbol[0]} imports {imported.module}, which is not installed")
                else:
                    definition.copied[name] = self._origin(imported.module, imported.name)
        for needed in definition.copied.values():
            self._reach(needed)

    def _ordered(self, roots: list[str]) -> list[Definition]:
        """Modules right before the first that uses them, and within a module as its author ordered it."""
        members: dict[str, list[Definition]] = {}
        for definition in self._found.values():
            members.setdefault(definition.symbol[0], []).append(definition)
        seen: set[str] = set()
        out: list[Definition] = []

        def visit(module: str) -> None:
            if module in seen:
                return
            seen.add(module)
            own = sorted(members[module], key=lambda d: d.node.lineno)
            for definition in own:
                for used, _ in definition.copied.values():
                    visit(used)
            out.extend(own)

        for root in roots:
            visit(root)
        constants = [d for d in out if d.symbol[0] in self._written and isinstance(d.node, _ASSIGNMENTS)]
        return [*constants, *(d for d in out if d not in constants)]

    def _names(self) -> dict[Symbol, str]:
        """The name each definition gets; where two modules use the same one, the operation's name is added."""
        wanted: dict[str, list[Definition]] = {}
        for definition in self.definitions:
            wanted.setdefault(definition.symbol[1], []).append(definition)
        taken = {name for d in self.definitions for name in d.imported}
        names: dict[Symbol, str] = {}
        for name, rivals in wanted.items():
            for definition in rivals:
                symbol = definition.symbol
                alone = len(rivals) == 1 or not name.startswith("_")
                options = [name] if alone else []
                options += [_qualified(symbol), *(f"{_qualified(symbol)}_{n}" for n in range(2, 100))]
                names[symbol] = next(o for o in options if o not in taken and not self._is_shadowed(symbol, o))
                taken.add(names[symbol])
        return names

    def _is_shadowed(self, symbol: Symbol, name: str) -> bool:
        """Whether a user of `symbol` that knows it by another name has a local variable called `name`."""
        for user in self.definitions:
            if any(s == symbol and alias != name for alias, s in user.copied.items()):
                scopes = [n for n in ast.walk(ast.parse(user.text)) if isinstance(n, SCOPES)]
                if any(name in bound_names(scope) for scope in scopes):
                    return True
        return False


_ASSIGNMENTS = (ast.Assign, ast.AnnAssign)


def _qualified(symbol: Symbol) -> str:
    """`_chunk` of archsearch_kernels.gla.reference becomes `_gla_chunk`."""
    module, name = symbol
    stem = module.removesuffix(".reference").rpartition(".")[2]
    return f"_{stem}{name}" if name.startswith("_") else f"{name}_{stem}"


def _renamed(definition: Definition, names: Mapping[Symbol, str]) -> str:
    own, new = definition.symbol[1], names[definition.symbol]
    if own == new and all(names[symbol] == name for name, symbol in definition.copied.items()):
        return definition.text
    source = Source(definition.text)
    statement = source.tree.body[0]
    edits = []
    for node in global_reads(source.tree):
        symbol = definition.copied.get(node.id)
        if symbol is not None and names[symbol] != node.id and isinstance(node.ctx, ast.Load):
            edits.append(Edit(*source.span(node), names[symbol]))
    if own != new:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            line = source.offset(statement.lineno, statement.col_offset)
            found = re.compile(rf"\b{own}\b").search(source.text, line)
            assert found is not None
            edits.append(Edit(found.start(), found.end(), new))
        else:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]  # type: ignore[attr-defined]
            edits += [Edit(*source.span(t), new) for t in targets]
    return apply(source.text, edits)


def _asking_for_kernel(text: str, op: str, taken: list[ast.arg]) -> str:
    """An operation that lets its kernel, whose parameters are `taken`, do the work where it runs."""
    source = Source(text)
    function = source.tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    given = [*function.args.args, *function.args.kwonlyargs]
    names, kernel = [a.arg for a in given], [a.arg for a in taken]
    assert set(names) <= set(kernel), f"the kernel of {op} takes no {set(names) - set(kernel)}"
    witness = next(a.arg for a in given if a.annotation is not None and ast.unparse(a.annotation) == "Tensor")
    n_first = next((i for i, (a, b) in enumerate(zip(names, kernel, strict=False)) if a != b), len(names))
    n_first = min(n_first, len(function.args.args) - len(function.args.defaults))
    arguments = [name if i < n_first else f"{name}={name}" for i, name in enumerate(names)]
    asked = f"    if use_kernels({witness}):\n        return kernels.{op}({', '.join(arguments)})\n"
    first = function.body[1 if ast.get_docstring(function) is not None else 0]
    at = source.line_span(*source.statement_lines(first))[0]
    return apply(text, [Edit(at, at, asked)])
