"""Parameters, results, attributes and wrappers that nobody needs any more go."""

from __future__ import annotations

import pytest
from specialising import dedent, specialised

CASES = {
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
def test_what_is_left(name: str) -> None:
    before, after = (dedent(text) for text in CASES[name])
    assert specialised(before) == after
