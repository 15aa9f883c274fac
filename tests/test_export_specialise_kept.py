"""What looks like an option with one value and is none stays as it is."""

from __future__ import annotations

import pytest
from specialising import dedent, specialised

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
    assert specialised(text) == text


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
    folded = specialised(text)
    assert "return -x" in folded
    assert "        return x\n" not in folded
