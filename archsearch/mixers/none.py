"""No mixer: a block that is only an FFN, as Nemotron-H counts its layers."""

from __future__ import annotations

from typing import Literal

from archsearch.contract import MixerSpec, ModuleCall, Site


class NoMixer(MixerSpec):
    """The block skips its mixer, norm included."""

    kind: Literal["none"] = "none"

    def call(self, site: Site) -> ModuleCall:
        raise AssertionError("a block with mixer none builds no mixer")

    def num_params(self, site: Site) -> int:
        return 0

    def flops(self, site: Site, n_tokens: int) -> int:
        return 0

    def step_flops(self, site: Site, context: int) -> int:
        return 0

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return 0
