"""The contract of channel mixers: exact costs, and every token on its own."""

from __future__ import annotations

from typing import Any

import torch

from archsearch.architecture import Block, ModelSpec, parse_ffn
from archsearch.contract import FFNSpec, Site
from archsearch.mixers.none import NoMixer
from archsearch.model import num_params
from archsearch.testing.checks import EXACT, distance, multiply_flops, seeded
from archsearch.testing.common import CONTEXT, Contract


class FFNContract(Contract):
    """What every channel mixer keeps to; list the `variants` to be tested."""

    def spec(self, variant: Any) -> FFNSpec:
        spec: FFNSpec = variant if isinstance(variant, FFNSpec) else parse_ffn(variant)
        return spec

    def model_spec(self, spec: FFNSpec, site: Site) -> ModelSpec:
        return ModelSpec(site.d_model, CONTEXT, 2, (Block(NoMixer(), spec),))

    def part(self, model: Any) -> Any:
        return model.blocks[0].ffn

    def test_num_params(self, variant: Any) -> None:
        spec = self.spec(variant)
        width = self.site(spec).d_model
        for site in (Site(width), Site(2 * width)):
            with torch.device("meta"):
                assert spec.num_params(site) == num_params(spec.call(site).build()), site
            assert 0 < spec.active_params(site) <= spec.num_params(site)

    def test_flops(self, variant: Any) -> None:
        spec, site, module = self.make(variant)
        x = seeded(1, 48, site.d_model)
        ran, linear = multiply_flops(module, lambda: module(x))
        assert linear <= ran
        assert spec.flops(site, 48) == ran

    def test_tokens_are_independent(self, variant: Any) -> None:
        _, site, module = self.make(variant)
        x = seeded(2, 40, site.d_model)
        y = module(x)
        for t in (0, 17, 39):
            assert distance(module(x[:, t : t + 1]), y[:, t : t + 1]) <= EXACT, f"token {t} depends on the others"
