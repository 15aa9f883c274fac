"""What folding leaves of comments, strings and docstrings, and how statements are laid out for their new length."""

from __future__ import annotations

from specialising import specialised

from archsearch.export.specialise.tidy import layout


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
    folded = specialised(text)
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
    folded = specialised(text)
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
    assert specialised(text).startswith(
        "def f(x, y, *, keep):\n"
        '    """Attention of x.\n\n'
        "    x [B, T], y [B, T] with H heads; keep: what stays. Returns [B, T].\n"
        '    """\n'
    )


def test_what_docstrings_say_of_other_cases_and_errors() -> None:
    text = '''
        def f(x, y=None, kind="low"):
            """Pick one.

            x [B]; y [B], None: no y. "high": the largest. "low": the
            smallest, y counted in. Raises ValueError if y is 1.
            """
            if kind == "high":
                return max(x)
            y = checked(y)
            return min(x, y) + y


        def g(x):
            """Its square. Raises ValueError if x is odd."""
            return x * x + len(str(x))


        def checked(x):
            """It. Raises ValueError if it is 1."""
            if x == 1:
                raise ValueError(x)
            return x


        def main(x):
            return f(x, y=x) + g(x) + f(g(x), x)
        '''
    folded = specialised(text)
    assert (
        '    """Pick one.\n\n    x [B]; y [B]. The smallest, y counted in. Raises ValueError if y is 1.\n    """\n'
    ) in folded
    assert '    """Its square."""\n' in folded
    assert '    """It. Raises ValueError if it is 1."""\n' in folded


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
