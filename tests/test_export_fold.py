"""Folding: options with one value go, everything else stays (`test_export_fold_random`: and computes the same)."""

from __future__ import annotations

import textwrap

import pytest

from archsearch.export.docs import trim_docstrings
from archsearch.export.fold import Folder
from archsearch.export.tidy import tidy

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
    "a factor of 1 that others are told": (
        """
        def f(x, scale):
            if x > 3:
                return tell(x, scale=scale)
            return x * scale


        def main(x):
            return f(x, scale=1.0)
        """,
        """
        def f(x):
            if x > 3:
                return tell(x, scale=1.0)
            return x


        def main(x):
            return f(x)
        """,
    ),
    "a default that unpacked arguments always fill": (
        """
        def parts(x):
            return x + 1, x + 2


        def f(x, y: int | None = None, z: int = 3):
            y = abs(y)
            return x * y - z * x


        def main(x):
            return f(*parts(x))
        """,
        """
        def parts(x):
            return x + 1, x + 2


        def f(x, y: int, z: int = 3):
            y = abs(y)
            return x * y - z * x


        def main(x):
            return f(*parts(x))
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
