"""What an expression can be, as far as the text of a model tells: a set of possibilities, or anything.

The domain of the constant propagation in `analysis.py` (Kildall 1973; Cousot & Cousot 1977): literals are known,
objects are known by class or only as "not None", and whatever comes out of a tensor is anything.
"""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MANY = 16  # more possibilities than this count as anything


@dataclass(frozen=True)
class Const:
    """A literal; the type keeps 1, 1.0 and True apart."""

    value: Any
    type: str

    @classmethod
    def of(cls, value: Any) -> Const:
        """The atom of a literal value."""
        return cls(value, type(value).__name__)


@dataclass(frozen=True)
class Instance:
    """An object of a copied class, by the class's name."""

    cls: str


@dataclass(frozen=True)
class Sequence:
    """A list, tuple or ModuleList whose elements are among these; `length` where it is a tuple written out."""

    elements: Value
    length: int | None = None


@dataclass(frozen=True)
class Object:
    """Something that is not None."""


Atom = Const | Instance | Sequence | Object


@dataclass(frozen=True)
class Value:
    """The possibilities; `atoms` None means anything at all."""

    atoms: frozenset[Atom] | None = frozenset()

    def __or__(self, other: Value) -> Value:
        if self is other or self.atoms is None:
            return self
        if other.atoms is None or not self.atoms:
            return other
        if other.atoms <= self.atoms:
            return self
        atoms = self.atoms | other.atoms
        return ANY if len(atoms) > MANY else Value(atoms)

    @property
    def truths(self) -> frozenset[bool]:
        """What bool() of it can be; empty while nothing is known to reach it."""
        if self.atoms is None:
            return BOTH
        found: set[bool] = set()
        for atom in self.atoms:
            match atom:
                case Const():
                    found.add(bool(atom.value))
                case Instance():
                    found.add(True)
                case _:
                    found |= BOTH
        return frozenset(found)

    @property
    def constant(self) -> Const | None:
        """The literal it must be, if there is exactly one."""
        if self.atoms is not None and len(self.atoms) == 1:
            (atom,) = self.atoms
            return atom if isinstance(atom, Const) else None
        return None

    @property
    def constants(self) -> list[Const] | None:
        """All the literals it can be, or None if it can be something else."""
        if self.atoms is None or not all(isinstance(a, Const) for a in self.atoms):
            return None
        return [a for a in self.atoms if isinstance(a, Const)]

    @property
    def elements(self) -> Value:
        """What iterating over it gives."""
        if self.atoms is None:
            return ANY
        out = NOTHING
        for atom in self.atoms:
            match atom:
                case Sequence():
                    out = out | atom.elements
                case Const(tuple() as items, _):
                    out = out | join(literal(item) for item in items)
                case _:
                    return ANY
        return out

    @property
    def length(self) -> int | None:
        """The number of elements, if it is known."""
        lengths = {a.length if isinstance(a, Sequence) else None for a in self.atoms or ()}
        return lengths.pop() if len(lengths) == 1 else None

    def can_be_none(self) -> bool:
        """Whether None is among the possibilities."""
        return self.atoms is None or Const.of(None) in self.atoms


BOTH = frozenset({True, False})
NOTHING = Value()
ANY = Value(None)
OBJECT = Value(frozenset({Object()}))


def literal(value: Any) -> Value:
    """The value of a literal."""
    return _common(value) if isinstance(value, int | str | None) else _exactly(value)


def _exactly(value: Any) -> Value:
    return Value(frozenset({Const.of(value)}))


_common = lru_cache(maxsize=1024, typed=True)(_exactly)  # not of tuples: (1,) and (True,) would be the same


def join(values: Iterable[Value]) -> Value:
    """Any of these."""
    out = NOTHING
    for value in values:
        out = out | value
    return out


def booleans(truths: Iterable[bool]) -> Value:
    """A bool among these."""
    return join(literal(t) for t in truths)


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def binary(op: ast.operator, left: Value, right: Value) -> Value:
    """left op right; numbers are computed, everything else is some object."""
    function = _BINARY.get(type(op))
    return OBJECT if function is None else _pairwise(function, left, right, OBJECT)


def compare(op: ast.cmpop, left: Value, right: Value) -> Value:
    """left op right as a bool; identity is decided for None alone."""
    if isinstance(op, ast.Is | ast.IsNot):
        same = _is_none(left) if right == literal(None) else _is_none(right) if left == literal(None) else BOTH
        if NOTHING in (left, right):
            return NOTHING
        return booleans(same if isinstance(op, ast.Is) else {not s for s in same})
    return _pairwise(_COMPARE[type(op)], left, right, OBJECT)  # a tensor, perhaps


def _is_none(value: Value) -> frozenset[bool]:
    if value.atoms is None:
        return BOTH
    return frozenset(atom == Const.of(None) for atom in value.atoms)


def _pairwise(function: Callable[[Any, Any], Any], left: Value, right: Value, otherwise: Value) -> Value:
    if NOTHING in (left, right):
        return NOTHING
    lefts, rights = left.constants, right.constants
    if lefts is None or rights is None or len(lefts) * len(rights) > MANY:
        return otherwise
    found = NOTHING
    for a, b in itertools.product(lefts, rights):
        try:
            found = found | literal(function(a.value, b.value))
        except (TypeError, ArithmeticError, ValueError):
            return otherwise
    return found
