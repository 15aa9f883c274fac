"""Branches, tests and factors whose outcome is always the same go (`test_export_specialise_kept`: others stay)."""

from __future__ import annotations

import pytest
from specialising import dedent, specialised

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
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left(name: str) -> None:
    before, after = (dedent(text) for text in CASES[name])
    assert specialised(before) == after
