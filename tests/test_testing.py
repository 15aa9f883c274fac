"""The contract tests pass a sound plug-in and catch every way in which one is broken here."""

from __future__ import annotations

import pytest
from example_plugin.spec import Average

from archsearch.contract import ModuleCall, Site
from archsearch.mixers import MIXERS
from archsearch.testing import MixerContract


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS.table, "average", "example_plugin.spec:Average")


class TestPlugin(MixerContract):
    variants = (Average(),)


@pytest.mark.parametrize(
    ("flaw", "caught_by"),
    [
        ("looks ahead", "test_causality"),
        ("mixes rows", "test_rows_of_a_batch_are_independent"),
        ("mixes documents", "test_documents_are_isolated"),
        ("forgets", "test_decode_is_forward"),
        ("remembers", "test_eval_is_pure_and_train_runs"),
        ("dead weight", "test_gradients_reach_everything"),
        ("uninitialised", "test_initialisation_fills_everything"),
        ("not saved", "test_state_dict_carries_everything"),
        ("widens", "test_bfloat16"),
        ("miscounted", "test_num_params"),
        ("half the flops", "test_flops"),
        ("state in the model's dtype", "test_state_bytes"),
    ],
)
def test_contract_catches(flaw: str, caught_by: str) -> None:
    with pytest.raises(AssertionError):
        getattr(MixerContract(), caught_by)(Average(flaw=flaw))


def test_contract_refuses_a_module_that_leans_on_archsearch() -> None:
    class Leaning(Average):
        def call(self, site: Site) -> ModuleCall:
            return ModuleCall("archsearch.model:HybridLM")

    with pytest.raises(AssertionError, match=r"model\.py imports archsearch"):
        MixerContract().test_module_can_be_exported(Leaning())


def test_contract_says_why_no_width_fits() -> None:
    class Picky(Average):
        def check(self, site: Site) -> None:
            raise ValueError(f"not at {site.d_model}")

    with pytest.raises(AssertionError, match=r"not at 64.*not at 256"):
        MixerContract().site(Picky())
