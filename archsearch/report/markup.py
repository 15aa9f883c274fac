"""HTML and SVG as text, safe by default: whatever is not Markup is escaped, attribute values always are."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Text made harmless, and made of characters that UTF-8 and HTML can hold."""
    clean = str(text).encode("utf-8", "backslashreplace").decode()
    return Markup(html.escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in clean)))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. `class_` and `data_trial` write `class` and `data-trial`; None and False leave an attribute out."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
        words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    return Markup(f"<{' '.join(words)}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Children side by side; None is nothing."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts if part is not None))
