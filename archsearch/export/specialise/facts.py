"""What an analysis tells the rules of rewriting; see `analysis.py`."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, fields

from archsearch.export.specialise.program import Procedure
from archsearch.export.specialise.values import Value

Parameter = tuple[Procedure, str]
Attribute = tuple[str, str]  # class, name


@dataclass
class Call:
    """A call of copied code: by callee, which argument fills which parameter."""

    node: ast.Call
    arguments: dict[Procedure, dict[str, ast.expr]] = field(default_factory=dict)


@dataclass
class Notes:
    """What reading one function tells of the nodes in it, and of what it reads."""

    truths: dict[ast.expr, frozenset[bool]] = field(default_factory=dict)  # of every test that is reached
    values: dict[ast.expr, Value] = field(default_factory=dict)  # of every name and attribute that is read
    chosen: dict[ast.Subscript, ast.expr] = field(default_factory=dict)  # {...}[key] with a known key: the entry
    calls: dict[ast.Call, Call] = field(default_factory=dict)
    results: dict[ast.Return, Procedure] = field(default_factory=dict)
    read_parameters: set[Parameter] = field(default_factory=set)
    read_attributes: set[Attribute] = field(default_factory=set)
    starred: set[Parameter] = field(default_factory=set)  # must stay in its place: filled by *args

    def add(self, notes: Notes) -> None:
        """Those of another function."""
        for name in (f.name for f in fields(Notes)):
            getattr(self, name).update(getattr(notes, name))


@dataclass
class Facts(Notes):
    """What holds wherever the model runs."""

    fixed: set[Parameter] = field(default_factory=set)  # must stay as it is: called from outside
    defaulted: set[Parameter] = field(default_factory=set)  # some call leaves it to the default
    attributes: dict[Attribute, Value] = field(default_factory=dict)
    parameters: dict[Parameter, Value] = field(default_factory=dict)
    reached: set[Procedure] = field(default_factory=set)
