"""Spec of a mixer as a third party would add one: a learned moving average. `flaw` breaks it on purpose."""

from __future__ import annotations

from typing import Literal

from archsearch.contract import FLOAT32_BYTES, MixerSpec, ModuleCall, Site


class Average(MixerSpec):
    """h_t = a h_{t-1} + (1 - a) W x_t with one learned a per feature."""

    kind: Literal["average"] = "average"
    flaw: str = ""

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall("example_plugin.module:Average", {"d_model": site.d_model, "flaw": self.flaw})

    def num_params(self, site: Site) -> int:
        matrices = 3 if self.flaw == "dead weight" else 2
        return matrices * site.d_model**2 + (0 if self.flaw == "miscounted" else site.d_model)

    def flops(self, site: Site, n_tokens: int) -> int:
        one = 3 * site.d_model**2 if self.flaw == "half the flops" else 4 * site.d_model**2
        return one * n_tokens

    def step_flops(self, site: Site, context: int) -> int:
        return self.flops(site, 1)

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return site.d_model * (dtype_bytes if self.flaw == "state in the model's dtype" else FLOAT32_BYTES)
