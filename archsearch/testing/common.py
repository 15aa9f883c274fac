"""The tests that mixers and FFNs have in common; what is tested is said in `archsearch/contract.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from archsearch.architecture import ModelSpec, dump, parse_ffn, parse_mixer
from archsearch.contract import MixerSpec, ModuleCall, Site, Spec
from archsearch.export.closure import Closure
from archsearch.model import build_model
from archsearch.testing.checks import EQUAL, EXACT, calls, distance, is_near, poisoned_memory, seeded

if TYPE_CHECKING:
    import pytest

CONTEXT = 64
NO_TORCH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"importing {name} imports torch"
"""


class Contract:
    """What mixers and FFNs have in common."""

    variants: ClassVar[Sequence[Mapping[str, Any] | Spec]] = ()
    widths: ClassVar[Sequence[int]] = (64, 128, 256)  # the first one that a variant accepts is used

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per variant."""
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize("variant", self.variants, ids=[_name(v) for v in self.variants])

    def spec(self, variant: Any) -> Any:
        """The variant's spec, its spans resolved."""
        raise AssertionError("inherit MixerContract or FFNContract")

    def model_spec(self, spec: Any, site: Site) -> ModelSpec:
        """A model of as few other parts as can be."""
        raise AssertionError("inherit MixerContract or FFNContract")

    def part(self, model: Any) -> Any:
        """The module under test in that model."""
        raise AssertionError("inherit MixerContract or FFNContract")

    def site(self, spec: Any) -> Site:
        """The narrowest of `widths` where the spec's widths divide."""
        refusals = []
        for width in self.widths:
            try:
                spec.check(Site(width))
                return Site(width)
            except ValueError as error:
                refusals.append(str(error))
        raise AssertionError(f"no width of {self.widths} fits: {refusals}")

    def make(self, variant: Any, seed: int = 0, noise: float = 0.02) -> tuple[Any, Site, Any]:
        """Spec, site and initialised module; noise, because a parameter of 0 could hide what it multiplies."""
        spec = self.spec(variant)
        site = self.site(spec)
        module = self.part(build_model(self.model_spec(spec, site), seed))
        with torch.no_grad():
            for i, parameter in enumerate(module.parameters()):
                parameter += noise * seeded(*parameter.shape, seed=1000 * seed + i)
        return spec, site, module

    def test_spec_survives_json(self, variant: Any) -> None:
        spec = self.spec(variant)
        parse = parse_mixer if isinstance(spec, MixerSpec) else parse_ffn
        assert parse(json.loads(json.dumps(dump(spec)))) == spec

    def test_specs_need_no_torch(self) -> None:
        """Only a plug-in's spec may stand in the file of its module, and is then as slow to import as torch."""
        modules = set()
        for variant in self.variants:
            spec = self.spec(variant)
            home = type(spec).__module__
            shares_file = home in {_module_of(call) for call in calls(spec.call(self.site(spec)))}
            if _is_ours(home) or not shares_file:
                modules.add(home)
        command = [sys.executable, "-c", NO_TORCH, *sorted(modules)]
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_module_can_be_exported(self, variant: Any) -> None:
        """The exporter copies a module and what it reaches, which of archsearch may be other modules only."""
        spec = self.spec(variant)
        call = spec.call(self.site(spec))
        json.dumps(call.arguments, default=lambda inner: inner.arguments)  # plain data and further calls only
        for each in calls(call):
            for home, name in (found.symbol for found in Closure([(_module_of(each), _class_of(each))]).definitions):
                assert not _is_ours(home) or home.startswith("archsearch.modules."), f"{each.target} uses {home}.{name}"

    def test_initialisation_fills_everything(self, variant: Any) -> None:
        spec = self.spec(variant)
        model_spec = self.model_spec(spec, self.site(spec))
        with poisoned_memory():
            one, same, other = (self.part(build_model(model_spec, seed)).state_dict() for seed in (0, 0, 1))
        for name, value in one.items():
            assert value.isfinite().all(), f"{name} is not initialised; fill it in reset_parameters"
            assert torch.equal(value, same[name]), f"{name} differs between two builds of one seed"
        assert any(not torch.equal(value, other[name]) for name, value in one.items())

    def test_state_dict_carries_everything(self, variant: Any) -> None:
        _, site, module = self.make(variant, seed=0)
        _, _, other = self.make(variant, seed=1)
        x = seeded(2, 70, site.d_model)
        assert distance(other(x), module(x)) > EQUAL
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), module(x))

    def test_gradients_reach_everything(self, variant: Any) -> None:
        _, site, module = self.make(variant)
        for arguments in self.inputs():
            x = seeded(2, 97, site.d_model).requires_grad_()
            module.zero_grad()
            y = module(x, *arguments)
            assert y.shape == x.shape
            assert y.dtype == x.dtype
            (y * seeded(*y.shape, seed=1)).sum().backward()
            for name, tensor in [("x", x), *module.named_parameters()]:
                assert tensor.grad is not None, f"no gradient reaches {name}"
                assert tensor.grad.isfinite().all(), f"the gradient of {name} is not finite"
                assert tensor.grad.abs().max() > 0, f"the gradient of {name} is 0"

    def inputs(self) -> list[tuple[Tensor, ...]]:
        """What a call takes besides x."""
        return [()]

    def test_rows_of_a_batch_are_independent(self, variant: Any) -> None:
        _, site, module = self.make(variant)
        x = seeded(3, 70, site.d_model)
        assert distance(module(x[1:2]), module(x)[1:2]) <= EXACT

    def test_eval_is_pure_and_train_runs(self, variant: Any) -> None:
        _, site, module = self.make(variant)
        x = seeded(2, 33, site.d_model)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        module.eval()
        assert torch.equal(module(x), module(x))
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert module.train()(x).isfinite().all()

    def test_bfloat16(self, variant: Any) -> None:
        """bfloat16 weights against the same rounded numbers in float32."""
        _, site, module = self.make(variant)
        x = seeded(2, 100, site.d_model).bfloat16()
        low = module.bfloat16()(x)
        assert low.dtype == torch.bfloat16
        assert is_near(low, module.float()(x.float()))

    def test_autocast(self, variant: Any) -> None:
        _, site, module = self.make(variant)
        x = seeded(2, 100, site.d_model)
        with torch.autocast("cpu", torch.bfloat16):
            low = module(x)
        assert is_near(low, module(x))
        low.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def _module_of(call: ModuleCall) -> str:
    return call.target.partition(":")[0]


def _class_of(call: ModuleCall) -> str:
    return call.target.partition(":")[2]


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "archsearch"


def _name(variant: Mapping[str, Any] | Spec) -> str:
    data = dump(variant) if isinstance(variant, Spec) else variant
    options = (f"{key}={value}" for key, value in data.items() if key != "kind")
    return "-".join([str(data["kind"]), *options]).replace(" ", "")
