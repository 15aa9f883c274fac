"""SwiGLU in the names that most stock classes share."""

from __future__ import annotations

from archsearch.architecture import ModelSpec
from archsearch.export.dialects.attention import renamed
from archsearch.export.dialects.base import Part, only, refuse
from archsearch.ffns.swiglu import SwiGLU


def swiglu(spec: ModelSpec, i: int, title: str, *, prefix: str = "mlp.", expected: str = "swiglu") -> Part:
    """The FFN of block i if it is a SwiGLU, as `gate_proj`, `up_proj`, `down_proj`; else it is refused."""
    ffn = spec.blocks[i].ffn
    if not isinstance(ffn, SwiGLU):
        refuse(spec, i, "ffn", f"{title} knows no {ffn.kind} as its FFN", expected)
    only(spec, i, "ffn", title, "expand")
    return Part(
        "dense", {"intermediate_size": ffn.d_hidden(spec.site(i))}, renamed(prefix), (f"{prefix}down_proj.weight",)
    )
