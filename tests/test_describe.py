"""Kinds described from their specs: every option with a meaning, its bounds and default."""

import re
from pathlib import Path

import pytest

from archsearch.describe import describe_kind, kind_names, nearest_kind
from archsearch.errors import SpaceError, UserError
from archsearch.ffns import FFNS
from archsearch.mixers import MIXERS
from archsearch.recipes import load_space


@pytest.mark.parametrize("name", [*MIXERS.table, *FFNS.table])
def test_every_option_of_every_kind_has_a_meaning(name: str) -> None:
    lines = describe_kind(name).splitlines()
    head = next((line for line in lines if line.startswith("option ")), "")
    lines = lines[lines.index(head) :] if head else []
    for registry in (MIXERS, FFNS):
        options = set(registry.load(name).model_fields) - {"kind"} if name in registry.names() else set()
        for option in options:
            (row,) = [line for line in lines if line.startswith(f"{option} ")]
            assert re.fullmatch(rf"{option} +\S.*?  +\S+ +\S.*", row), row
            meaning = row[head.index("default") + len("default") :].strip()
            assert meaning, row


def test_a_description_says_paper_type_default_and_meaning() -> None:
    moe, attention = describe_kind("moe"), describe_kind("attention")
    assert moe.startswith("moe (ffn): Mixture of experts: softmax top-k (2006.16668")
    rows = {line.split()[0]: " ".join(line.split()) for line in f"{moe}\n{attention}".splitlines() if line}
    assert rows["top_k"] == "top_k whole number, at least 1 2 experts that a token passes"
    assert rows["rope_fraction"].startswith("rope_fraction number, above 0, at most 1 1 share of head_dim")
    assert rows["kv_groups"].startswith("kv_groups whole number, at least 1 | all 1 query heads")
    assert rows["window"].startswith("window tokens, or '1/4 context' - tokens that")
    assert "expand   number, above 0  8/3 " in describe_kind("swiglu").replace("expand  number", "expand   number")
    assert describe_kind("none").count("skips its") == 2, "a mixer and an FFN are called none"
    assert "of list required" in " ".join(describe_kind("parallel").split())


def test_names_of_the_field_lead_to_kinds() -> None:
    assert nearest_kind("gdn") == " Did you mean 'gated_deltanet'?"
    assert nearest_kind("GQA") == " Did you mean 'attention'?"
    assert nearest_kind("short_cnv") == " Did you mean 'short_conv'?"
    with pytest.raises(UserError, match=r"unknown kind 'retnet'; expected one of .*Did you mean 'scalar_decay'"):
        describe_kind("retnet")
    assert {"moe", "mla", "none"} <= set(kind_names())


def test_words_that_are_no_file_are_answered_with_recipes_and_kinds() -> None:
    with pytest.raises(SpaceError, match=r"gdn: no such file, recipe or kind\. Recipes: .*jamba.*gated_deltanet'\?"):
        load_space(Path("gdn"))
    with pytest.raises(SpaceError, match=r"Did you mean 'jamba'"):
        load_space(Path("jmba"))
    with pytest.raises(SpaceError, match=r"nowhere\.yaml: no such file$"):
        load_space(Path("nowhere.yaml"))
