"""Imports of exported code: what they bind, which of them may stay, and how they are written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

CONFIGURATION = "archsearch.export.hf.configuration"  # a file of its own in a Hugging Face folder
GLUE = "archsearch_exported_kernels"  # stands for the file that finds the kernels; see `export.kernels`
KEPT_IMPORTS = frozenset({"torch", "transformers", *sys.stdlib_module_names})


@dataclass(frozen=True)
class Imported:
    """What an import binds: `from module import name`, or `import module` where name is None."""

    module: str
    name: str | None

    @property
    def is_kept(self) -> bool:
        """Whether the exported file may import it too."""
        return self.module.partition(".")[0] in KEPT_IMPORTS or self.module in (CONFIGURATION, GLUE)


def import_lines(imports: Mapping[str, Imported]) -> str:
    """Import statements that bind these names: the standard library first, then packages, then our own files."""
    plain: dict[str, list[str]] = {"std": [], "packages": [], "own": []}

    def group(module: str) -> list[str]:
        top = module.partition(".")[0]
        return plain["std" if top in sys.stdlib_module_names else "packages" if top in KEPT_IMPORTS else "own"]

    members: dict[str, list[str]] = {}
    for bound, imported in imports.items():
        if imported.name is None:
            same = bound == imported.module
            line = f"import {imported.module}" if same else f"import {imported.module} as {bound}"
            group(imported.module).append(line)
        else:
            member = imported.name if bound == imported.name else f"{imported.name} as {bound}"
            members.setdefault(imported.module, []).append(member)
    for module, found in members.items():
        found.sort(key=lambda m: (not m.isupper(), m[0].islower(), m))  # CONSTANT, Class, function
        group(module).append(f"from {module} import {', '.join(found)}")
    groups = ("\n".join(sorted(g, key=lambda s: (s.startswith("from"), s))) for g in plain.values() if g)
    return "\n\n".join(groups) + "\n"
