"""One colour per family of mixers, the same in every report, told apart with any colour vision.

The built-in colours were chosen so that every pair stays at least 20 apart in CIELAB for normal sight and under
simulated protanopia, deuteranopia and tritanopia (Machado et al. 2009); a test holds that. Letters say it again.
"""

from __future__ import annotations

import hashlib

MIXER_COLOURS = {
    "attention": "#d55e00",
    "attention, windowed": "#f4b30e",
    "mla": "#7f2705",
    "moba": "#efdf7a",
    "scalar_decay": "#6ee4ff",
    "gla": "#cfe8d6",
    "mamba": "#7dc884",
    "mamba2": "#0d874f",
    "deltanet": "#a08ef8",
    "gated_deltanet": "#1b52d5",
    "kda": "#473383",
    "short_conv": "#d05fa8",
}
FFN_COLOURS = {"swiglu": "#8692a2", "mlp": "#cdd3db", "moe": "#3d4856"}
_OTHERS = ("#7f5a3c", "#c49a6c", "#5b2a5e", "#a8324e", "#4f6b1f", "#b9bd3a", "#1f6f78", "#777777")


def is_known(kind: str) -> bool:
    """Whether the kind has a colour of its own; others are hatched."""
    return kind in MIXER_COLOURS or kind in FFN_COLOURS or kind == "none"


def mixer_colour(kind: str) -> str | None:
    """Hex colour of a mixer kind; a kind that is not ours gets one by its name, always the same. None: no mixer."""
    return None if kind == "none" else MIXER_COLOURS.get(kind) or _other(kind)


def ffn_colour(kind: str) -> str | None:
    """Hex colour of an FFN kind, as `mixer_colour`."""
    return None if kind == "none" else FFN_COLOURS.get(kind) or _other(kind)


def _other(kind: str) -> str:
    digest = hashlib.sha256(kind.encode("utf-8", "backslashreplace")).digest()
    return _OTHERS[digest[0] % len(_OTHERS)]


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG contrast)."""
    return "#000000" if luminance(colour) > 0.179 else "#ffffff"


def luminance(colour: str) -> float:
    """Relative luminance in [0, 1] of a hex colour (WCAG 2)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
