"""Names to classes: a literal table first, installed plug-ins second, then "did you mean".

Families are imported when they are first used; nothing registers itself by being imported.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from archsearch.errors import UserError, did_you_mean, one_of

log = logging.getLogger(__name__)


class Registry:
    """One kind of thing (`mixer`, `ffn`, `objective`) by name.

    `table` maps a name to `package.module:Class`; `group` is the entry-point group where plug-ins add theirs, whose
    names must be new. `check` says what keeps something that a plug-in gives under a name from being one, if anything.
    """

    def __init__(
        self, what: str, table: dict[str, str], group: str, check: Callable[[Any, str], str | None] | None = None
    ) -> None:
        self.what = what
        self.table = table
        self.group = group
        self.check = check
        self._loaded: dict[str, Any] = {}

    def names(self) -> list[str]:
        """All names, built-in ones first."""
        for name in _plugins(self.group).keys() & self.table.keys():
            _say_once(f"'{name}'{_origin(_plugins(self.group)[name])} is not used: it is a {self.what} of archsearch")
        return [*self.table, *(n for n in _plugins(self.group) if n not in self.table)]

    def load(self, name: object) -> Any:
        """The class called `name`; raises UserError with the nearest known name, or why a plug-in cannot be loaded."""
        if not isinstance(name, str) or (name not in self.table and name not in _plugins(self.group)):
            raise UserError(
                f"unknown {self.what} {name!r}; expected {one_of(self.names())}.{did_you_mean(name, self.names())}"
            )
        if name not in self._loaded:
            if name in self.table:
                module, _, attribute = self.table[name].partition(":")
                self._loaded[name] = getattr(importlib.import_module(module), attribute)
            else:
                self._loaded[name] = _load(_plugins(self.group)[name], self.check)
        return self._loaded[name]


@cache
def _plugins(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def _origin(point: EntryPoint) -> str:
    of = f" of {point.dist.name}" if point.dist is not None else ""
    return f", a plug-in{of} ({point.group}),"


def _load(point: EntryPoint, check: Callable[[Any, str], str | None] | None) -> Any:
    failed = f"'{point.name}'{_origin(point)} cannot be loaded from {point.value}"
    try:
        module = importlib.import_module(point.module)
    except ImportError as error:
        raise UserError(f"{failed}: {error}") from error
    if not hasattr(module, point.attr.partition(".")[0]):
        raise UserError(f"{failed}: {point.module} has no {point.attr}.{did_you_mean(point.attr, vars(module))}")
    found = point.load()
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{failed}: {point.attr} does not define {', '.join(missing)}")
    if check is not None and (why := check(found, point.name)) is not None:
        raise UserError(f"{failed}: {point.attr} {why}")
    return found
