"""Token mixers by name. One file here says what a family is and costs; `modules/` holds the torch code.

To add one: a spec file here, a module file there, one line below; the contract tests find it.
"""

from archsearch.contract import MixerSpec, not_a
from archsearch.registry import Registry

MIXERS = Registry(
    "mixer",
    {
        # softmax attention
        "attention": "archsearch.mixers.attention:Attention",
        "mla": "archsearch.mixers.mla:MLA",
        "moba": "archsearch.mixers.moba:MoBA",
        # linear attention and state space models
        "scalar_decay": "archsearch.mixers.scalar_decay:ScalarDecay",
        "gla": "archsearch.mixers.gla:GLA",
        "mamba": "archsearch.mixers.mamba:Mamba",
        "mamba2": "archsearch.mixers.mamba2:Mamba2",
        # delta rule
        "deltanet": "archsearch.mixers.deltanet:DeltaNet",
        "gated_deltanet": "archsearch.mixers.gated_deltanet:GatedDeltaNet",
        "kda": "archsearch.mixers.kda:KDA",
        # local
        "short_conv": "archsearch.mixers.short_conv:ShortConv",
        # combinators
        "parallel": "archsearch.mixers.parallel:Parallel",
        "none": "archsearch.mixers.none:NoMixer",
    },
    group="archsearch.mixers",
    check=not_a(MixerSpec),
)
