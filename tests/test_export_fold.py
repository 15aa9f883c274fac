"""Folding: options with one value go, everything else stays; and what is left computes the same."""

from __future__ import annotations

import random
import textwrap

import pytest

from archsearch.export.docs import trim_docstrings
from archsearch.export.fold import Folder
from archsearch.export.tidy import layout, tidy

ENTRIES = frozenset({"main"})


def fold(text: str) -> str:
    """The text, specialised to what `main` does, formatted."""
    before = textwrap.dedent(text).lstrip("\n")
    folder = Folder(before, ENTRIES)
    folded = trim_docstrings(folder.run(), folder.dropped, folder.required)
    return tidy("import math\n" + folded, before).partition("\n\n\n")[2]


def dedent(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


CASES = {
    "a branch that is never taken": (
        """
        def f(x, option=False):
            x = x + 1
            if option:  # never
                x = x + 1
            return x * x


        def main(x):
            return f(x), f(x, option=False)
        """,
        """
        def f(x):
            x = x + 1
            return x * x


        def main(x):
            return f(x), f(x)
        """,
    ),
    "each arm of an if": (
        """
        def f(x, kind):
            if kind == "a":
                x = 1
            elif x > 3:
                # kept as it is
                x = 2
            elif kind == "b":
                x = 3
            else:
                x = 4
            if kind == "c":
                x += 1
            elif x == 2:
                x += 2
            if x > 0:
                y = 5
            elif kind != "b":
                y = 6
            else:
                y = 7
            return x * y


        def main(x):
            return f(x, "b") + f(-x, kind="b")
        """,
        """
        def f(x):
            if x > 3:
                # kept as it is
                x = 2
            else:
                x = 3
            if x == 2:
                x += 2
            if x > 0:
                y = 5
            else:
                y = 7
            return x * y


        def main(x):
            return f(x) + f(-x)
        """,
    ),
    "an emptied arm turns the test round": (
        """
        def f(x, option):
            if x is None:
                if option:
                    x = 1
            else:
                x = x + 1
            return x


        def main(x):
            return f(x, False)
        """,
        """
        def f(x):
            if x is not None:
                x = x + 1
            return x


        def main(x):
            return f(x)
        """,
    ),
    "tests in expressions": (
        """
        TABLE = {"none": 0, "one": 1}


        def f(x, gate="none", scale=1.0, size=None):
            n = {"none": 0, "one": x}[gate]
            y = (x if n else -x) * scale
            if size is None and x > 0 and gate != "one":
                y = y + (1 if gate == "one" else 2) * x
            return y


        def main(x):
            return f(x)
        """,
        """
        def f(x):
            y = -x
            if x > 0:
                y = y + 2 * x
            return y


        def main(x):
            return f(x)
        """,
    ),
    "attributes": (
        """
        class Layer:
            \"\"\"A layer; `gate` multiplies it.

            bias is added. `size`: how large.
            \"\"\"

            def __init__(self, size, gate=False, bias=None):
                self.size = size
                self.gate = gate
                self.bias = math.sqrt(2) if bias else None

            def forward(self, x):
                y = x * self.size
                if self.gate:
                    y = y * y
                return y if self.bias is None else y + self.bias


        def main(x):
            return Layer(2).forward(x) + Layer(size=3).forward(x)
        """,
        """
        class Layer:
            \"\"\"A layer.

            bias is added. `size`: how large.
            \"\"\"

            def __init__(self, size):
                self.size = size

            def forward(self, x):
                return x * self.size


        def main(x):
            return Layer(2).forward(x) + Layer(size=3).forward(x)
        """,
    ),
    "an argument that one of several callees needs": (
        """
        class A:
            def forward(self, x, position, extra=None):
                return x + position


        class B:
            def forward(self, x, position, extra=None):
                return x


        def main(x):
            total = 0
            for layer in [A(), B()]:
                total += layer.forward(x, 3)
            return total
        """,
        """
        class A:
            def forward(self, x, position):
                return x + position


        class B:
            def forward(self, x, position):
                return x


        def main(x):
            total = 0
            for layer in [A(), B()]:
                total += layer.forward(x, 3)
            return total
        """,
    ),
    "results that nobody keeps": (
        """
        def f(x):
            y = x + 1
            return y * 2, (y, 3)


        def g(x) -> tuple[int, int, int]:
            x = x + x
            return x, x + 1, x + 2


        def main(x):
            y, _ = f(x)
            z, _, w = g(y)
            return y + z + w
        """,
        """
        def f(x):
            y = x + 1
            return y * 2


        def g(x) -> tuple[int, int]:
            x = x + x
            return x, x + 2


        def main(x):
            y = f(x)
            z, w = g(y)
            return y + z + w
        """,
    ),
    "only what is still the same everywhere": (
        """
        def f(x, *, window=None, sink=None, causal=True):
            if window is None:
                return x
            if sink is not None:
                x = x + sink
            return x - window if causal else x


        def main(x):
            return f(x) + f(x, window=3) + f(x, window=4, causal=True)
        """,
        """
        def f(x, *, window=None):
            if window is None:
                return x
            return x - window


        def main(x):
            return f(x) + f(x, window=3) + f(x, window=4)
        """,
    ),
    "a wrapper that has nothing left to do": (
        """
        class Layer:
            def __init__(self, scale=1.0):
                self.scale = scale

            def forward(self, x):
                return self.add(x, x * 3)

            def add(self, x, y):
                return x + y if self.scale == 1.0 else x + self.scale * y


        def main(x):
            return Layer().forward(x)
        """,
        """
        class Layer:
            def forward(self, x):
                return x + (x * 3)


        def main(x):
            return Layer().forward(x)
        """,
    ),
    "optional where it never is": (
        """
        def f(x: int, size: int | None = None, *, more: int | None = None) -> int:
            total = x + size if size is not None else x
            return total if more is None else total + more


        def main(x):
            return f(x, 3) + f(x, 4, more=2) + f(x, 5, more=x)
        """,
        """
        def f(x: int, size: int, *, more: int | None = None) -> int:
            total = x + size
            return total if more is None else total + more


        def main(x):
            return f(x, 3) + f(x, 4, more=2) + f(x, 5, more=x)
        """,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fold(name: str) -> None:
    before, after = (dedent(text) for text in CASES[name])
    assert fold(before) == after


KEPT = {
    "a name that a loop changes": """
        def main(xs):
            found = False
            for x in xs:
                if found:
                    return x
                found = x > 1
            return None
        """,
    "a function handed on": """
        def f(x, option=False):
            return -x if option else x


        def main(x):
            return max(x, key=f)
        """,
    "arguments behind a star": """
        def f(x, y=0, option=None):
            return x if option is None else y


        def main(x):
            return f(*x)
        """,
    "an attribute that someone else sets": """
        class Layer:
            def __init__(self):
                self.on = False

            def forward(self, x):
                return x if self.on else -x


        def main(x):
            layer = Layer()
            layer.on = True
            return layer.forward(x)
        """,
    "attributes set by name": """
        class Layer:
            def __init__(self):
                self.on = False

            def forward(self, x):
                return x if self.on else -x


        def main(x, name):
            layer = Layer()
            setattr(layer, name, True)
            return layer.forward(x)
        """,
    "a name that a nested function reads late": """
        def main(x):
            on = False

            def late():
                return x if on else -x

            on = x > 3
            return late()
        """,
    "what an exception may have skipped": """
        def main(x):
            done = False
            try:
                x = 1 / x
                done = True
            except ZeroDivisionError:
                x = 0
            return x if done else -1
        """,
    "a method that an heir overrides": """
        class Base:
            def forward(self, x):
                return self.pick(x) if self.wants(x) else x

            def wants(self, x):
                return False

            def pick(self, x):
                return x + 1


        class Heir(Base):
            def wants(self, x):
                return x > 0


        def main(x):
            return Base().forward(x) + Heir().forward(x)
        """,
    "a count that happens to be 1": """
        def f(x, heads=1):
            return x * heads


        def main(x):
            return f(x) + f(-x)
        """,
    "calls that do something": """
        def main(xs):
            last = xs.pop()
            return xs
        """,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_option_stays(name: str) -> None:
    text = dedent(KEPT[name])
    assert fold(text) == text


def test_methods_of_a_base_that_has_no_objects() -> None:
    text = """
        class Base:
            def forward(self, x):
                return self.part(x)

            def part(self, x):
                return x


        class Heir(Base):
            def part(self, x):
                return -x


        def main(x):
            return Heir().forward(x)
        """
    folded = fold(text)
    assert "return -x" in folded
    assert "        return x\n" not in folded


def test_comments_and_strings_survive() -> None:
    text = """
        def f(x, option=True):
            # above the branch
            if option:
                # inside
                y = x + 1  # behind: größer, μ
                y += 1  # type: ignore[misc]
                text = f'''
            not indented {x}
            '''
            else:
                y = x
            # below
            return (text, y)


        def main(x):
            return f(x)
        """
    folded = fold(text)
    assert "    # inside\n    y = x + 1  # behind: größer, μ\n" in folded
    assert "f'''\n    not indented {x}\n    '''" in folded
    assert "    # below\n    return (text, y)" in folded
    assert "    y += 1\n" in folded
    assert "option" not in folded


def test_a_table_keeps_the_row_of_the_value_it_has() -> None:
    text = '''
        class Layer:
            """Decays.

            | variant | decay  |
            | ------- | ------ |
            | `one`   | fixed  |
            | two     | learnt |
            """

            def __init__(self, variant):
                self.variant = variant

            def forward(self, x):
                return x if self.variant == "one" else -x


        def main(x):
            return Layer("two").forward(x)
        '''
    folded = fold(text)
    assert "| two     | learnt |" in folded
    assert "fixed" not in folded


def test_what_docstrings_say_of_options_that_went() -> None:
    text = '''
        def f(x, y, *, sink=None, scale=None, kind="a", keep=None):
            """Attention of x; `sink` is one more key.

            x [B, T], sink [H], y [B, T] with H heads; `scale` of the logits, it is
            1 by default; keep: what stays. Returns [B, T]; `kind` of
            the kernel. Raises ValueError if `kind` is none. keep None: all of it.
            """
            if sink is not None:
                x = x + sink
            if kind == "b":
                raise ValueError(kind)
            x = x + keep
            return x * y if scale is None else x * y * scale


        def main(x):
            return f(x, x, keep=x) + f(x, 2, kind="a", keep=1)
        '''
    assert fold(text).startswith(
        "def f(x, y, *, keep):\n"
        '    """Attention of x.\n\n'
        "    x [B, T], y [B, T] with H heads; keep: what stays. Returns [B, T].\n"
        '    """\n'
    )


def test_layout_of_long_and_short_statements() -> None:
    assert layout("    f(\n        1,\n        2,\n    )\n") == "    f(1, 2)\n"
    assert layout("x = (\n    1,\n)\n") == "x = (1,)\n"
    long = f"a_long_function_name({', '.join(f'argument_{i}=value' for i in range(6))})\n"
    assert layout(long).splitlines()[1].startswith("    argument_0=value, argument_1=value")
    longer = layout(f"call({', '.join(f'argument_{i}=value' for i in range(12))})\n")
    assert longer.splitlines()[1:3] == ["    argument_0=value,", "    argument_1=value,"]
    header = f"def function({', '.join(f'parameter_{i}: int' for i in range(6))}) -> tuple[int, int]:\n"
    assert layout(header).splitlines()[0] == "def function("
    assert layout(header).splitlines()[-1] == ") -> tuple[int, int]:"


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
    folder = Folder(before, ENTRIES)
    after = tidy("import math\n" + folder.run(), before)
    spaces = [{}, {}]
    for text, space in zip((before, after), spaces, strict=True):
        exec(compile(text, "program", "exec"), space)
    assert [spaces[0]["main"](x) for x in (-4, 0, 1, 7)] == [spaces[1]["main"](x) for x in (-4, 0, 1, 7)], after
    assert len(after) <= len(before) + 200
