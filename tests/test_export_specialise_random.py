"""Folding random programs: what is left of them computes the same."""

from __future__ import annotations

import random

import pytest
from specialising import ENTRIES

from archsearch.export.specialise.specialiser import Specialiser
from archsearch.export.specialise.tidy import tidy


class Writer:
    """Writes a random program whose functions have options of every sort; all arithmetic is on integers."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def integer(self, names: list[str], depth: int = 2) -> str:
        kind = self.rng.randrange(7) if depth else self.rng.randrange(2)
        if kind == 0:
            return str(self.rng.randrange(-3, 9))
        if kind == 1:
            return self.rng.choice(names)
        if kind == 2:
            test = self.test(names, depth - 1)
            return f"({self.integer(names, depth - 1)} if {test} else {self.integer(names, depth - 1)})"
        if kind == 3:
            return "(0 if o is None else o)"
        return f"({self.integer(names, depth - 1)} {self.rng.choice('+-*')} {self.integer(names, depth - 1)})"

    def test(self, names: list[str], depth: int = 2) -> str:
        kind = self.rng.randrange(8) if depth else self.rng.randrange(4)
        if kind < 4:
            return ["o is None", "b", 's == "on"', "not b"][kind]
        if kind < 6:
            sign = self.rng.choice(["<", ">=", "=="])
            return f"{self.integer(names, depth - 1)} {sign} {self.integer(names, depth - 1)}"
        return f"({self.test(names, depth - 1)} {self.rng.choice(['and', 'or'])} {self.test(names, depth - 1)})"

    def block(self, names: list[str], calls: list[str], depth: int, indent: str) -> list[str]:
        lines = []
        for _ in range(self.rng.randrange(1, 4)):
            kind = self.rng.randrange(8)
            target = self.rng.choice([*names[:1], "y", "z"])
            if kind < 3 or not depth:
                lines.append(f"{target} = {self.integer(names)}")
            elif kind == 3 and calls:
                lines.append(f"{target} = {self.rng.choice(calls).format(self.integer(names, 1))}")
            elif kind == 4:
                lines.append(f"for i in range({self.rng.randrange(3)}):")
                lines += self.block([*names, "i"], calls, depth - 1, "    ")
            elif kind == 5:
                option = self.rng.choice(["b = not b", 's = "on"', "o = None", "o = 4"])
                lines.append(option if self.rng.random() < 0.3 else f"z = {self.integer(names)}")
            else:
                lines.append(f"if {self.test(names)}:")
                lines += self.block(names, calls, depth - 1, "    ")
                if self.rng.random() < 0.4:
                    lines.append(f"elif {self.test(names)}:")
                    lines += self.block(names, calls, depth - 1, "    ")
                if self.rng.random() < 0.5:
                    lines.append("else:")
                    lines += self.block(names, calls, depth - 1, "    ")
        if depth == 2 and self.rng.random() < 0.3:
            lines.append(f"if {self.test(names)}:\n    return {self.integer(names)}")
        return [indent + line for text in lines for line in text.split("\n")]

    def options(self) -> str:
        given = []
        if self.rng.random() < 0.5:
            given.append(f"b={self.rng.choice(['True', 'False'])}")
        if self.rng.random() < 0.5:
            given.append(f"s={self.rng.choice([chr(34) + 'on' + chr(34), chr(34) + 'off' + chr(34)])}")
        if self.rng.random() < 0.5:
            given.append(f"o={self.rng.choice(['None', '3', 'x'])}")
        return "".join(f", {g}" for g in given)

    def program(self) -> str:
        names = ["x", "y", "z"]
        defaults = "b=False, s='off', o=None"
        lines = [
            f"def inner(x, {defaults}):",
            "    y = z = 1",
            *self.block(names, [], 2, "    "),
            "    return x + y",
            "",
            "",
        ]
        inner = [f"inner({{}}{self.options()})" for _ in range(2)]
        lines += [f"def outer(x, *, {defaults}):", "    y, z = 2, x", *self.block(names, inner, 2, "    ")]
        lines += ["    return y * z", "", "", "class Layer:", f"    def __init__(self, x, {defaults}):"]
        lines += [
            "        self.b, self.s = b, s",
            "        self.o = o",
            f"        self.size = {self.integer(['x'])}",
            "",
        ]
        lines += ["    def run(self, x):", "        b, s, o = self.b, self.s, self.o", "        y, z = self.size, 0"]
        lines += [*self.block(names, [*inner, "self.part({})"], 2, "        "), "        return x + y - z", ""]
        lines += ["    def part(self, x, b=True):", "        o, s = self.o, self.s", "        y = z = x"]
        lines += [*self.block(names, inner, 2, "        "), "        return z", "", "", "def main(x):", "    total = 0"]
        calls = [f"outer(x{self.options()})", f"outer(x{self.options()})", f"inner(x{self.options()})"]
        calls += [f"Layer({self.rng.randrange(5)}{self.options()}).run(x)" for _ in range(2)]
        lines += [f"    total += {call}" for call in self.rng.sample(calls, self.rng.randrange(2, 6))]
        return "\n".join([*lines, "    return total", ""])


@pytest.mark.parametrize("seed", range(80))
def test_random_programs_compute_the_same(seed: int) -> None:
    before = Writer(seed).program()
    specialiser = Specialiser(before, ENTRIES)
    after = tidy("import math\n" + specialiser.run().text, before)
    spaces = [{}, {}]
    for text, space in zip((before, after), spaces, strict=True):
        exec(compile(text, "program", "exec"), space)
    assert [spaces[0]["main"](x) for x in (-4, 0, 1, 7)] == [spaces[1]["main"](x) for x in (-4, 0, 1, 7)], after
    assert len(after) <= len(before) + 200
