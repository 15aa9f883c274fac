"""Contract tests of mixers and FFNs as classes to inherit: the built-in ones pass them and so must a plug-in.

    from archsearch.testing import MixerContract

    class TestRetention(MixerContract):
        variants = ({"kind": "retention"}, {"kind": "retention", "head_dim": 16})

A variant is what a space.yaml would say, or a ready spec. pytest collects these classes but is not imported here.
"""

import sys

if (pytest := sys.modules.get("pytest")) is not None:  # failing asserts then show their values
    pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in ("common", "mixer", "ffn")))

from archsearch.testing.ffn import FFNContract as FFNContract
from archsearch.testing.mixer import MixerContract as MixerContract
