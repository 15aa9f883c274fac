"""The rules of a search space: a small expression language with an AST of its own, never `eval`.

    count(full) >= 1                              params(target) <= 3e9
    mixer[0] != full and mixer[-1] == full        state_bytes(target, context=131072) <= 512 MiB
    run_length(gdn) <= 5 or fraction(moe) < 1/2   not (ffn[0] == moe)

Layout functions read the target's blocks unless a scale is named: count(full, proxy). A name stands for what
space.yaml calls it, or, where the file has no such name, for a kind (`count(attention)`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from archsearch import cost
from archsearch.architecture import Architecture, ModelSpec
from archsearch.errors import did_you_mean, one_of
from archsearch.quantity import BYTES, IEC, NUMBER, SI

UNITS = {**{unit: factor for unit, factor in SI.items() if unit not in ("", "B")}, **IEC, **BYTES}
SCALES = ("proxy", "target")
KEYWORDS = ("and", "or", "not")
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}
LAYOUT_FUNCTIONS = ("count", "fraction", "run_length")  # of a name; scale optional
COST_FUNCTIONS: dict[str, tuple[str, ...]] = {  # of a scale; keyword arguments
    "params": (),
    "active_params": (),
    "flops": ("context",),
    "state_bytes": ("context", "batch"),
}
MEASURED_IN = {
    "count": "blocks",
    "fraction": "a fraction of the blocks",
    "run_length": "blocks",
    "params": "parameters",
    "active_params": "parameters",
    "flops": "FLOPs",
    "state_bytes": "bytes",
}
LISTS = ("mixer", "ffn")
_SIGNS = {  # of other languages
    "&": "'and'",
    "|": "'or'",
    "!": "'not'",
    "≤": "'<='",
    "≥": "'>='",
    "≠": "'!='",
    "×": "'*'",
    "%": "a fraction such as 1/2",
    '"': "names without quotes",
    "'": "names without quotes",
}
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>{NUMBER.removeprefix('[+-]?')})|(?P<word>[A-Za-z_]\w*)|(?P<op><=|>=|==|!=|[-+*/()\[\],=<>]))"
)


class RuleError(ValueError):
    """A rule that cannot be read or evaluated."""


@dataclass(frozen=True)
class Literal_:
    value: float
    unit: str | None = None  # bytes, if the number was written with one of their units


@dataclass(frozen=True)
class Name:
    value: str


@dataclass(frozen=True)
class Item:
    what: str
    index: int


@dataclass(frozen=True)
class Call:
    function: str
    name: str | None
    scale: str
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Binary:
    op: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Not:
    inner: Node


Node = Literal_ | Name | Item | Call | Binary | Not


@dataclass(frozen=True)
class Verdict:
    """Whether a rule holds; `violation` is 0 if it does, else how far off (relative, above 0); `why` for people."""

    ok: bool
    violation: float
    why: str


@dataclass(frozen=True)
class Rule:
    """One parsed rule."""

    text: str
    node: Node

    def judge(self, architecture: Architecture) -> Verdict:
        """Evaluate on an architecture; raises RuleError if an index lies outside the layout."""
        ok, violation = _judge(self.node, architecture)
        if ok:
            return Verdict(True, 0.0, self.text)
        shown = _show(self.node, architecture)
        return Verdict(False, max(violation, 1e-6), f"{self.text} is false" + (f": {shown}" if shown else ""))


def parse_rule(text: object, names: Iterable[str]) -> Rule:
    """Parse one rule; `names` are what layout functions may speak of. Raises RuleError with the nearest word."""
    if text is None:
        raise RuleError("found nothing; expected a rule such as 'count(full) >= 1'")
    if not isinstance(text, str):
        raise RuleError(f"found {text!r}; expected a rule such as 'count(full) >= 1'")
    if len(text) > 1000:
        raise RuleError(f"found {len(text)} characters; a rule has at most 1000")
    parser = _Parser(text, set(names))
    node = parser.parse()
    if not _is_truth(node):
        raise RuleError(f"'{text}' is not true or false; compare it with something, such as '{text.strip()} >= 1'")
    return Rule(text.strip(), node)


class _Parser:
    """Precedence climbing over a list of tokens."""

    LEVELS = (("or",), ("and",), tuple(COMPARISONS), ("+", "-"), ("*", "/"))
    MAX_DEPTH = 50

    def __init__(self, text: str, names: set[str]) -> None:
        self.text, self.names = text, names
        self.tokens = self._split(text)
        self.at = 0
        self.depth = 0

    def _split(self, text: str) -> list[tuple[str, str]]:
        tokens, at = [], 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None or match.lastgroup is None:
                rest = text[at:].strip()
                hint = next((f"; write {word}" for sign, word in _SIGNS.items() if rest.startswith(sign)), "")
                raise RuleError(f"cannot read '{rest[:20]}' in '{text}'{hint}")
            tokens.append((match.lastgroup, match[match.lastgroup]))
            at = match.end()
        return tokens

    def _peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "the end")

    def _take(self, expected: str | None = None) -> tuple[str, str]:
        kind, text = self._peek()
        if expected is not None and text != expected:
            self._refuse_assignment()
            raise RuleError(f"found {text} where '{expected}' was expected, in '{self.text}'")
        self.at += 1
        return kind, text

    def _refuse_assignment(self) -> None:
        if self._peek()[1] == "=":
            after = self.tokens[self.at + 1][1] if self.at + 1 < len(self.tokens) else ""
            found, meant = ("=" + after, f"{after}=") if after in ("<", ">") else ("=", "==")
            raise RuleError(f"found '{found}', in '{self.text}'; write '{meant}' to compare")

    def parse(self) -> Node:
        node = self._level(0)
        if self._peek()[0] != "end":
            self._refuse_assignment()
            hint = "; write 3000000 or 3M, without commas" if self._peek()[1] == "," else ""
            raise RuleError(f"found '{self._peek()[1]}' after a complete rule, in '{self.text}'{hint}")
        return node

    def _level(self, level: int) -> Node:
        if level == len(self.LEVELS):
            return self._unary()
        left = self._level(level + 1)
        chained = False
        while self._peek()[1] in self.LEVELS[level]:
            op = self._take()[1]
            if chained and op in COMPARISONS:
                raise RuleError(f"chained comparison; write 'a < b and b < c', in '{self.text}'")
            right = self._level(level + 1)
            self._check_operands(op, left, right)
            left, chained = Binary(op, left, right), True
        return left

    def _check_operands(self, op: str, left: Node, right: Node) -> None:
        for node in (left, right):
            if op in ("and", "or"):
                if not _is_truth(node):
                    raise RuleError(f"'{op}' joins comparisons, in '{self.text}'")
            elif _is_truth(node):
                raise RuleError(f"'{op}' compares or computes with numbers and names, in '{self.text}'")
        texts = [_is_text(node) for node in (left, right)]
        if any(texts) and (op not in ("==", "!=") or not all(texts)):
            name = next((node.value for node in (left, right) if isinstance(node, Name)), None)
            hint = f"; for how many blocks have it write count({name})" if name is not None else ""
            raise RuleError(f"names compare by == and != with mixer[i] or ffn[i], in '{self.text}'{hint}")
        if op in COMPARISONS or op in ("+", "-"):
            self._check_units(op, left, right)

    def _check_units(self, op: str, left: Node, right: Node) -> None:
        units = {unit for node in (left, right) if (unit := _unit_of(node)) is not None}
        if "bytes" in units and len(units) > 1:
            (counted,) = units - {"bytes"}
            hint = "; for their bytes write 2 * params(target)" if counted == "parameters" else ""
            raise RuleError(
                f"'{op}' takes {counted} and bytes together, in '{self.text}'; write {counted} without a unit of "
                f"bytes, such as {'1/2' if counted.startswith('a ') else '12, 20M or 3e9'}{hint}"
            )

    def _unary(self) -> Node:
        self.depth += 1
        if self.depth > self.MAX_DEPTH:
            raise RuleError(f"more than {self.MAX_DEPTH} nested parts, in '{self.text[:40]}...'")
        try:
            return self._atom()
        finally:
            self.depth -= 1

    def _atom(self) -> Node:
        kind, text = self._take()
        if text == "not":
            inner = self._unary() if self._peek()[1] == "(" else self._level(2)
            if not _is_truth(inner):
                raise RuleError(f"'not' takes a comparison, in '{self.text}'")
            return Not(inner)
        if text == "(":
            node = self._level(0)
            self._take(")")
            return node
        if text == "-":
            return Binary("-", Literal_(0.0), self._unary())
        if kind == "number":
            unit = self._unit()
            return Literal_(float(text) * UNITS.get(unit, 1), "bytes" if unit in BYTES else None)
        if kind != "word":
            raise RuleError(f"found '{text}' where a number, a name or a function was expected, in '{self.text}'")
        if text in LISTS and self._peek()[1] == "[":
            return self._item(text)
        if self._peek()[1] == "(":
            return self._call(text)
        if text not in self.names:
            if text in MEASURED_IN or text in LISTS:
                raise RuleError(f"'{text}' stands alone in '{self.text}'; write {self._example(text)}")
            known = [*self.names, *LAYOUT_FUNCTIONS, *COST_FUNCTIONS]
            raise RuleError(f"unknown name '{text}' in '{self.text}'; expected {one_of(self.names)}"
                            f" or a function.{did_you_mean(text, known)}")  # fmt: skip
        return Name(text)

    def _example(self, function: str) -> str:
        """How a function or a list is written."""
        if function in LISTS:
            return f"{function}[0]"
        return f"{function}({min(self.names, default='name') if function in LAYOUT_FUNCTIONS else 'target'})"

    def _unit(self) -> str:
        kind, text = self._peek()
        if kind != "word" or text in KEYWORDS:
            return ""
        if text not in UNITS:
            raise RuleError(f"unknown unit '{text}' in '{self.text}'; expected {one_of(UNITS)}")
        self._take()
        return text

    def _item(self, what: str) -> Item:
        self._take("[")
        sign = -1 if self._peek()[1] == "-" else 1
        if sign < 0:
            self._take()
        kind, text = self._take()
        if kind != "number" or not text.isdigit():
            raise RuleError(f"{what}[{text}]: expected a block number such as 0 or -1, in '{self.text}'")
        self._take("]")
        return Item(what, sign * int(text))

    def _call(self, function: str) -> Call:
        known = (*LAYOUT_FUNCTIONS, *COST_FUNCTIONS)
        if function not in known:
            hint = did_you_mean(function, known)
            raise RuleError(f"unknown function '{function}' in '{self.text}'; expected {one_of(known)}.{hint}")
        words, options = self._arguments(function)
        name = None
        if function in LAYOUT_FUNCTIONS:
            if not words or words[0] not in self.names:
                found = words[0] if words else "nothing"
                raise RuleError(
                    f"{function}() takes a name, found {found}, in '{self.text}'; expected "
                    f"{one_of(self.names)}.{did_you_mean(found, self.names)}"
                )
            name, words = words[0], words[1:]
        scale = words[0] if words else "target"
        if scale not in SCALES or len(words) > 1:
            raise RuleError(f"{function}(): found '{', '.join(words)}', expected proxy or target, in '{self.text}'")
        return Call(function, name, scale, options)

    def _arguments(self, function: str) -> tuple[list[str], tuple[tuple[str, int], ...]]:
        self._take("(")
        words: list[str] = []
        options: list[tuple[str, int]] = []
        while self._peek()[1] != ")":
            kind, text = self._take()
            if kind != "word":
                raise RuleError(f"{function}(): found '{text}' where a name was expected, in '{self.text}'")
            if self._peek()[1] == "=":
                allowed = COST_FUNCTIONS.get(function, ())
                if text not in allowed:
                    takes = one_of(allowed) if allowed else "no option"
                    raise RuleError(f"{function}() has no option '{text}', in '{self.text}'; it takes {takes}")
                self._take("=")
                kind, number = self._take()
                if kind != "number":
                    raise RuleError(f"{function}({text}=...): found '{number}', expected a number, in '{self.text}'")
                unit = self._unit()
                value = float(number) * UNITS.get(unit, 1)
                if unit in BYTES:
                    raise RuleError(f"{function}({text}={number} {unit}): found bytes, expected a whole number such as "
                                    f"4096 or 32 Ki, in '{self.text}'")  # fmt: skip
                if value != int(value) or value < 1:
                    raise RuleError(f"{function}({text}=...): expected a whole number above 0, in '{self.text}'")
                options.append((text, int(value)))
            else:
                words.append(text)
            if self._peek()[1] == ",":
                self._take()
        self._take(")")
        return words, tuple(options)


def _is_truth(node: Node) -> bool:
    return isinstance(node, Not) or (isinstance(node, Binary) and (node.op in COMPARISONS or node.op in ("and", "or")))


def _unit_of(node: Node) -> str | None:
    """What a node counts; None where any unit would do: plain numbers, and products (bytes per block and the like)."""
    if isinstance(node, Literal_):
        return node.unit
    if isinstance(node, Call):
        return MEASURED_IN[node.function]
    if isinstance(node, Binary) and node.op in ("+", "-"):
        return _unit_of(node.left) or _unit_of(node.right)
    return None


def _is_text(node: Node) -> bool:
    return isinstance(node, Name | Item)


def _judge(node: Node, architecture: Architecture) -> tuple[bool, float]:
    """Truth and violation; `and` adds violations up, `or` takes the smallest."""
    if isinstance(node, Not):
        ok, _ = _judge(node.inner, architecture)
        return not ok, 1.0 if ok else 0.0
    assert isinstance(node, Binary)
    if node.op in ("and", "or"):
        (left, a), (right, b) = _judge(node.left, architecture), _judge(node.right, architecture)
        return (left and right, a + b) if node.op == "and" else (left or right, 0.0 if left or right else min(a, b))
    left_, right_ = _value(node.left, architecture), _value(node.right, architecture)
    if COMPARISONS[node.op](left_, right_):
        return True, 0.0
    if isinstance(left_, str) or isinstance(right_, str):
        return False, 1.0
    return False, abs(left_ - right_) / max(abs(left_), abs(right_), 1e-12)


def _value(node: Node, architecture: Architecture) -> float | str:
    if isinstance(node, Literal_ | Name):
        return node.value
    if isinstance(node, Item):
        names = _labels(architecture.at("target"), node.what)
        if not -len(names) <= node.index < len(names):
            raise RuleError(f"{node.what}[{node.index}] lies outside the {len(names)} blocks of the target")
        return names[node.index][0]
    if isinstance(node, Call):
        return _called(node, architecture.at(node.scale))
    assert isinstance(node, Binary)
    left, right = _value(node.left, architecture), _value(node.right, architecture)
    assert not isinstance(left, str)
    assert not isinstance(right, str)
    if node.op == "/" and right == 0:
        raise RuleError("division by zero")
    operations: Mapping[str, Callable[[float, float], float]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    return operations[node.op](left, right)


def _labels(model: ModelSpec, what: str) -> list[tuple[str, str]]:
    """(name in the file, kind) of every block's mixer or ffn."""
    if what == "mixer":
        return [(block.mixer_name, block.mixer.kind) for block in model.blocks]
    return [(block.ffn_name, block.ffn.kind) for block in model.blocks]


def _called(call: Call, model: ModelSpec) -> float:
    if call.function in COST_FUNCTIONS:
        function: Callable[..., float] = getattr(cost, call.function)
        return function(model, **dict(call.options))
    mixers, ffns = _labels(model, "mixer"), _labels(model, "ffn")
    hits = [call.name in (m[0], f[0]) for m, f in zip(mixers, ffns, strict=True)]
    if not any(hits):  # no such name in this layout: a kind
        hits = [call.name in (m[1], f[1]) for m, f in zip(mixers, ffns, strict=True)]
    if call.function == "run_length":
        return max((len(list(run)) for hit, run in groupby(hits) if hit), default=0)
    return sum(hits) if call.function == "count" else sum(hits) / len(hits)


def _show(node: Node, architecture: Architecture) -> str:
    """`0 >= 1` for a comparison that failed; empty for anything larger."""
    if not isinstance(node, Binary) or node.op not in COMPARISONS:
        return ""
    left, right = (_value(side, architecture) for side in (node.left, node.right))
    return " ".join([_number(left), node.op, _number(right)])


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
