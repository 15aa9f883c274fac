"""Mixers side by side on the same input: the intra-layer hybrids Hymba (2411.13676) and Falcon-H1 (2507.22448)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, field_serializer, field_validator

from archsearch.contract import MixerSpec, ModuleCall, Site
from archsearch.mixers import MIXERS


def _branch(value: object) -> object:
    """A spec from plain data; problems keep their place (`of.1.head_dim`)."""
    if isinstance(value, dict):
        return MIXERS.load(value.get("kind")).model_validate(value)
    return value


Branch = Annotated[MixerSpec, BeforeValidator(_branch)]


class Parallel(MixerSpec):
    """Every mixer of `of` reads the same normed input; `fuse` makes one output of theirs.

    fuse: `sum` adds them (Falcon-H1); `mean_norm` is the mean of their RMS-normed outputs, with a learned scale per
    channel and branch (Hymba); `concat` lays them side by side and projects back to d_model. A branch's keys and
    values are not shared across blocks.
    """

    kind: Literal["parallel"] = "parallel"
    of: tuple[Branch, ...]
    """names of mixers of this file, two or more"""
    fuse: Literal["sum", "mean_norm", "concat"] = "mean_norm"
    """how the branches' outputs become one"""

    @field_validator("of")
    @classmethod
    def _fit_to_stand_side_by_side(cls, of: tuple[MixerSpec, ...]) -> tuple[MixerSpec, ...]:
        if len(of) < 2:
            raise ValueError(f"found {len(of)} branches; expected at least 2")
        for spec in of:
            if spec.kind in ("parallel", "none"):
                raise ValueError(
                    f"found a branch of kind {spec.kind!r}; expected a mixer that is neither parallel nor none"
                )
            if not spec.causal:
                raise ValueError(f"found a branch of kind {spec.kind!r}, which is not causal; expected causal mixers")
        return of

    @field_serializer("of")
    def _with_their_kinds(self, of: tuple[MixerSpec, ...]) -> list[dict[str, Any]]:
        return [{"kind": spec.kind, **spec.model_dump(mode="json", exclude_defaults=True)} for spec in of]

    def at_context(self, context: int) -> Self:
        return self.model_copy(update={"of": tuple(spec.at_context(context) for spec in self.of)})

    def check(self, site: Site) -> None:
        for i, spec in enumerate(self.of):
            try:
                spec.check(site)
            except ValueError as error:
                raise ValueError(f"branch {i} ({spec.kind}): {error}") from error

    def call(self, site: Site) -> ModuleCall:
        return ModuleCall(
            "archsearch.modules.parallel:Parallel",
            {"mixers": [spec.call(site) for spec in self.of], "d_model": site.d_model, "fuse": self.fuse},
        )

    def _fuse_matrix(self, site: Site) -> int:
        return len(self.of) * site.d_model**2 if self.fuse == "concat" else 0

    def num_params(self, site: Site) -> int:
        norms = len(self.of) * site.d_model if self.fuse == "mean_norm" else 0
        return sum(spec.num_params(site) for spec in self.of) + norms + self._fuse_matrix(site)

    def flops(self, site: Site, n_tokens: int) -> int:
        """The branches' own, and 2 T n D^2 of `concat`'s projection."""
        return sum(spec.flops(site, n_tokens) for spec in self.of) + 2 * n_tokens * self._fuse_matrix(site)

    def step_flops(self, site: Site, context: int) -> int:
        return sum(spec.step_flops(site, context) for spec in self.of) + 2 * self._fuse_matrix(site)

    def state_bytes(self, site: Site, context: int, dtype_bytes: int) -> int:
        return sum(spec.state_bytes(site, context, dtype_bytes) for spec in self.of)
