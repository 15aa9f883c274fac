"""Channel mixers by name; see `archsearch/mixers/__init__.py` for how to add one."""

from archsearch.contract import FFNSpec, not_a
from archsearch.registry import Registry

FFNS = Registry(
    "ffn",
    {
        "swiglu": "archsearch.ffns.swiglu:SwiGLU",
        "mlp": "archsearch.ffns.mlp:MLP",
        "moe": "archsearch.ffns.moe:MoE",
        "none": "archsearch.ffns.none:NoFFN",
    },
    group="archsearch.ffns",
    check=not_a(FFNSpec),
)
