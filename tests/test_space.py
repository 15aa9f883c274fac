"""The whole language: what loads, what it resolves to, and what every mistake is told."""

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces import TINY, WIDE

from archsearch import cost, registry
from archsearch.architecture import Architecture
from archsearch.choosers import FixedChooser, RandomChooser
from archsearch.contract import Site
from archsearch.errors import SpaceError
from archsearch.mixers import MIXERS
from archsearch.mixers.short_conv import ShortConv
from archsearch.space import SearchSpace

TINY_SPACE = SearchSpace.from_text(TINY)
WIDE_SPACE = SearchSpace.from_text(WIDE)


def mutated(old: str, new: str, text: str = WIDE) -> str:
    assert old in text
    return text.replace(old, new, 1)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_candidates_resolve_at_both_scales(seed: int) -> None:
    candidate = WIDE_SPACE.sample(RandomChooser(seed))
    proxy, target = candidate.architecture.at("proxy"), candidate.architecture.at("target")
    assert (proxy.n_blocks, target.n_blocks) == (12, 48)
    assert (proxy.vocab_size, target.vocab_size) == (257, 128_000)
    assert (proxy.dtype, target.dtype) == ("float32", "bfloat16")
    assert {block.mixer_name for block in target.blocks} <= {"full", "swa", "gqa", "both"}
    assert all(not isinstance(b.mixer.model_dump().get("window"), str) for m in (proxy, target) for b in m.blocks)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_identity_survives_json_and_records(seed: int) -> None:
    candidate = WIDE_SPACE.sample(RandomChooser(seed))
    again = Architecture.from_json(candidate.architecture.to_json())
    assert again == candidate.architecture
    assert again.arch_id == candidate.architecture.arch_id
    replayed = WIDE_SPACE.sample(FixedChooser(candidate.holes))
    assert replayed.architecture.arch_id == candidate.architecture.arch_id
    assert replayed.train == candidate.train


def test_windows_follow_each_scale() -> None:
    candidate = TINY_SPACE.sample(RandomChooser(0))
    windows = {
        scale: {b.mixer.model_dump()["window"] for b in model.blocks if b.mixer_name == "swa"}
        for scale, model in candidate.architecture.scales.items()
    }
    assert windows == {"proxy": {16}, "target": {64}}


def test_same_graph_same_id_whatever_the_names() -> None:
    renamed = TINY.replace("swa", "local").replace("full", "global_").replace("dense", "mlp")
    listed = mutated(
        "{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}",
        "{pattern: [swa, swa, swa, full]}",
        TINY,
    )
    by_ratio = TINY.replace("{choice: [1, 3]}", "3").replace("{choice: [even, first]}", "even")
    ids = {
        SearchSpace.from_text(text.replace("{choice: [1, 2]}", "1")).sample(RandomChooser(0)).architecture.arch_id
        for text in (
            listed,
            by_ratio,
            renamed.replace("{choice: [1, 3]}", "3").replace("{choice: [even, first]}", "even"),
        )
    }
    assert len(ids) == 1


def test_growing_differently_is_another_architecture() -> None:
    text = mutated(
        "{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}",
        "{blocks: [swa, full, swa, full], grow: HOW}",
        TINY.replace("{choice: [1, 2]}", "1"),
    )
    stretch, stack = (
        SearchSpace.from_text(text.replace("HOW", how)).sample(RandomChooser(0)).architecture
        for how in ("stretch", "stack")
    )
    assert stretch.at("proxy") == stack.at("proxy")
    assert stretch.arch_id != stack.arch_id


def test_per_block_values_follow_their_blocks_to_the_target() -> None:
    text = TINY.replace("window: 1/4 context", "window: {choice: [8, 16], per: block}")
    text = text.replace("{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}", "swa")
    candidate = SearchSpace.from_text(text).sample(RandomChooser(5))
    windows = [b.mixer.model_dump()["window"] for b in candidate.architecture.at("proxy").blocks]
    assert len(set(windows)) == 2
    target = [b.mixer.model_dump()["window"] for b in candidate.architecture.at("target").blocks]
    assert target == [w for w in windows for _ in range(2)]
    assert [candidate.holes[f"mixers.swa.window@{i}"] for i in range(4)] == windows


def test_holes_of_unused_mixers_are_not_asked_for() -> None:
    text = TINY.replace("{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}", "swa")
    assert SearchSpace.from_text(text).sample(RandomChooser(0)).holes == {}


def test_sharing_adds_edges_and_leaves_what_cannot_read() -> None:
    share = "share: {kv: {span: 2}, weights: {mixer: full}}\n"
    one = (
        TINY.replace("{choice: [1, 3]}", "1")
        .replace("{choice: [even, first]}", "even")
        .replace("{choice: [1, 2]}", "1")
    )
    model = SearchSpace.from_text(one + share).sample(RandomChooser(0)).architecture.at("target")
    names = [block.mixer_name for block in model.blocks]
    assert names == ["swa", "full"] * 4
    assert [block.kv_from for block in model.blocks] == [None, None, 0, 1, None, None, 4, 5]
    assert [block.mixer_weights_from for block in model.blocks] == [None, None, None, 1, None, 1, None, 1]
    yoco = SearchSpace.from_text(one + "share: {kv: {from: middle}}\n").sample(RandomChooser(0)).architecture
    assert [block.kv_from for block in yoco.at("target").blocks] == [None, None, None, None, 2, 3, 2, 3]


def test_several_mixers_may_each_have_one_set_of_weights() -> None:
    ratio = "{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}"
    text = mutated(ratio, "{pattern: [swa, full, full, swa]}", TINY.replace("{choice: [1, 2]}", "1"))
    shared = text + "share: {weights: {mixer: [swa, full], ffn: dense}}\n"
    model = SearchSpace.from_text(shared).sample(RandomChooser(0)).architecture.at("target")
    assert [block.mixer_weights_from for block in model.blocks] == [None, None, 1, 0, 0, 1, 1, 0]
    assert [block.ffn_weights_from for block in model.blocks] == [None, *[0] * 7]
    whole = SearchSpace.from_text(text).sample(RandomChooser(0)).architecture.at("target")
    one = {block.mixer_name: block.mixer.num_params(Site(64)) for block in model.blocks}
    of_ffns = 7 * model.blocks[0].ffn.num_params(Site(64))
    assert cost.params(whole) - cost.params(model) == 3 * sum(one.values()) + of_ffns
    with pytest.raises(
        SpaceError, match=r"share\.weights\.mixer is 'ful'; expected one of full, swa\. Did you mean 'full'"
    ):
        SearchSpace.from_text(shared.replace("[swa, full], ffn", "[swa, ful], ffn"))


def test_what_stands_side_by_side_does_so_at_fewer_blocks() -> None:
    mixers, ffns = "[swa, swa, swa, swa, full, full]", "[dense, dense, dense, none, none, dense]"
    text = TINY.replace("{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}", mixers)
    text = text.replace("ffn: dense", f"ffn: {{pattern: {ffns}}}").replace("ffns:", "ffns:\n  none: {kind: none}")
    model = SearchSpace.from_text(text).sample(RandomChooser(0)).architecture.at("proxy")
    pairs = [(block.mixer_name, block.ffn_name) for block in model.blocks]
    assert pairs == [("swa", "dense"), ("swa", "none"), ("full", "none"), ("full", "dense")]


def test_refusals_name_the_rule_and_the_graph() -> None:
    space = SearchSpace.from_text(TINY + "rules: [count(full) > 100, 'mixer[0] == swa']\n")
    refusal = space.refusal(space.sample(RandomChooser(1)))
    assert refusal is not None
    assert refusal.reason == "rule"
    assert "count(full) > 100 is false" in refusal.message
    assert refusal.violations["count(full) > 100"] > 0
    space = SearchSpace.from_text(TINY.replace("head_dim: 16", "head_dim: {choice: [4, 16]}").replace("64,", "40,"))
    refusals = [space.refusal(space.sample(RandomChooser(seed))) for seed in range(20)]
    assert None in refusals, "heads of 4 fit"
    graph = [refusal for refusal in refusals if refusal is not None]
    assert {refusal.reason for refusal in graph} == {"graph"}
    why = "head_dim 16 does not divide the width 40 (expand 1 x d_model 40); write a divisor of 40"
    full, swa = f"space.yaml:8: mixers.full at target scale: {why}", f"space.yaml:9: mixers.swa at target scale: {why}"
    assert {detail for refusal in graph for detail in refusal.details} == {full, swa}, "once, not once a block"
    space = SearchSpace.from_text("rules: ['mixer[7] == swa']" + TINY.replace("n_blocks: 8", "n_blocks: 4"))
    candidate = space.sample(RandomChooser(0))
    with pytest.raises(SpaceError, match=r"space\.yaml:1: rules: 'mixer\[7\] == swa': mixer\[7\] lies outside"):
        space.refusal(candidate)


def test_what_can_never_fit_is_a_mistake_of_its_line() -> None:
    with pytest.raises(SpaceError) as caught:
        SearchSpace.from_text(mutated("head_dim: 16, window", "head_dim: 48, window", TINY))
    at_proxy, at_target = caught.value.problems
    assert at_proxy.startswith("space.yaml:9: mixers.swa at proxy scale: head_dim 48 does not divide the width 32")
    assert at_target.startswith("space.yaml:9: mixers.swa at target scale: head_dim 48 does not divide the width 64")
    moe = TINY.replace("dense: {kind: swiglu, expand: 2}", "dense: {kind: moe, n_experts: N, top_k: 12}")
    with pytest.raises(SpaceError) as caught:
        SearchSpace.from_text(moe.replace("N", "8"))
    (only,) = caught.value.problems
    assert only == "space.yaml:11: ffns.dense cannot be built: top_k 12 is more than n_experts 8; write at most 8"
    some = SearchSpace.from_text(moe.replace("N", "{choice: [8, 16]}"))  # one option will do
    refusals = [some.refusal(some.sample(RandomChooser(seed))) for seed in range(10)]
    assert None in refusals
    assert "space.yaml:11: ffns.dense at proxy scale: top_k 12 is more" in next(filter(None, refusals)).message


def test_a_parallel_mixer_leaves_its_mistakes_to_its_branches() -> None:
    text = TINY.replace("head_dim: 16, window", "head_dim: 48, window").replace(
        "ffns:", "  both: {kind: parallel, of: [full, swa]}\nffns:"
    )
    with pytest.raises(SpaceError) as caught:
        SearchSpace.from_text(text)
    assert [problem.split(" at ")[0] for problem in caught.value.problems] == ["space.yaml:9: mixers.swa"] * 2


class EMA(ShortConv):
    """A mixer of another package."""

    kind: Literal["ema"] = "ema"  # type: ignore[assignment]


def test_rules_speak_of_the_kinds_of_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("ema", f"{__name__}:EMA", "archsearch.mixers")
    monkeypatch.setattr(registry, "_plugins", lambda group: {"ema": point} if group == "archsearch.mixers" else {})
    monkeypatch.setattr(MIXERS, "_loaded", {})
    text = TINY.replace("swa:  {kind: attention, head_dim: 16, window: 1/4 context}", "swa: {kind: ema}")
    space = SearchSpace.from_text(text + "rules: [count(ema) >= 1, count(ema) <= 4]\n")
    refusals = [space.refusal(space.sample(RandomChooser(seed))) for seed in range(20)]
    assert None in refusals
    assert any(refusal is not None and refusal.details == ("count(ema) <= 4 is false: 6 <= 4",) for refusal in refusals)


def test_problems_come_in_the_order_of_their_lines() -> None:
    text = mutated("count(full) >= 1", "count(ful) >= 1").replace("schedule: wsd", "schedule: wds")
    text = text.replace("head_dim: 64, kv_groups: 2", "head_dim: sixty").replace("norm: rmsnorm", "norm: rnsnorm")
    with pytest.raises(SpaceError) as caught:
        SearchSpace.from_text(text.replace("kind: causal_lm", "kind: casual_lm"))
    lines = [int(problem.split(":")[1]) for problem in caught.value.problems]
    assert lines == sorted(lines) == [5, 12, 17, 35, 43]


MISTAKES = [
    ("kind: attention, head_dim: 64, kv_groups: 2", "kind: atention", r":12: mixers\.gqa\.kind is 'atention'.*Did you mean 'attention'"),
    ("head_dim: 64, kv_groups: 2", "head_dim: sixty", r":12: mixers\.gqa\.head_dim is 'sixty'; expected a whole number"),
    ("head_dim: 64, kv_groups: 2", "head_dim: 1", "expected a number at least 2"),
    ("window: {choice: [64, 1/4 context], per: block}", "windw: 3", r":11: mixers\.swa has an unknown key 'windw'.*'window'"),
    ("[64, 1/4 context]", "[64, 5/4 context]", r":11: mixers\.swa\.window is '5/4 context'; expected a fraction"),
    ("per: block", "per: blok", r"mixers\.swa\.window\.per is 'blok'; expected block or stage"),
    ("choice: [rope, none]", "choice: [rope, nope]", r"mixers\.full\.position is 'nope'; expected 'rope' or 'none'"),
    ("of: [gqa, swa]", "of: [gqa, swq]", r":13: mixers\.both\.of\[1\] is 'swq'.*Did you mean 'swa'"),
    ("of: [gqa, swa]", "of: [gqa, both]", r"mixers\.both\.of\[1\] is 'both'"),
    ("pattern: [swa, swa, swa, full]", "pattern: [swa, swq]", r":21: layout\.mixer\.pattern\[1\] is 'swq'.*'swa'"),
    ("pattern: [swa, swa, swa, full]", "patern: [swa]", "Did you mean 'pattern'"),
    ("even, first", "evn, first", r":23: layout\.mixer\.place\.full is 'evn'.*Did you mean 'even'"),
    ("of: 1/2, pattern", "of: 1/3, pattern", r"layout\.mixer\.stages has fractions that add up to"),
    ("{pattern: {choice: [[dense], [dense, wide], [wide]]}, first: dense}", "{pattern: [dnse]}", "Did you mean 'dense'"),
    ("expand: 8/3", "expand: 8/0", r"ffns\.dense\.expand is '8/0'; expected a number"),
    ("dense: {kind: swiglu, expand: 8/3}", "dense: {expand: 8/3}", r"ffns\.dense has no 'kind'"),
    ("dense: {kind: swiglu, expand: 8/3}", "dense: swiglu", r"ffns\.dense has no 'kind'"),
    ("dense: {kind", "gqa: {kind", "names a mixer already"),
    ("log_range: [1e4, 1e6]", "log_range: [0, 4]", "expected a low end above 0"),
    ("{span: 2}, {from", "{spn: 2}, {from", r"share\.kv has an unknown key 'spn'; expected one of from, span"),
    ("{span: 2}, {from", "{span: 1}, {from", r"share\.kv\.span is 1; expected a number at least 2"),
    ("from: middle", "from: midle", r"share\.kv\.from is 'midle'"),
    ("{mixer: full}", "{mixer: ful}", r"share\.weights\.mixer is 'ful'.*Did you mean 'full'"),
    ("norm: rmsnorm", "norm: rsmnorm", "Did you mean 'rmsnorm'"),
    ("count(full) >= 1", "count(ful) >= 1", r":35: rules\[0\] cannot be read: .*Did you mean 'full'"),
    ("name: val_bpb", "name: val_bbp", r"objectives\[0\]\.name is 'val_bbp'.*Did you mean 'val_bpb'"),
    ("batch: 64}, limit: 50", "batch: 1}", r"objectives\[2\] repeats 'decode_ms'"),
    ("schedule: wsd", "schedule: wds", r"train\.schedule is 'wds'"),
    ("tokens: 4M", "tokens: 4X", r"train\.tokens is '4X'"),
    ("rungs: [1/16, 1/4, 1]", "rungs: [1/4, 1/16]", "must rise and end at 1"),
    ("trials: 64", "trials: 64, seeds: 2", "seeds 2 needs a baseline"),
    ("trials: 64", "trials: {choice: [1, 2]}", "search.trials is a hole; holes may stand in"),
    ("trial_timeout: 10 min", "trial_timeout: 10 minutes", "expected a duration"),
    ("n_blocks: 12", "n_blocks: 0", r"scales\.proxy\.n_blocks is 0; expected a number at least 1"),
    ("n_blocks: 12", "n_blcks: 12", r"scales\.proxy has no 'n_blocks'"),
    ("  proxy:", "  prxy:", "has no 'proxy'"),
    ("  target:", "  targt:", "Did you mean 'target'"),
    ("archsearch: 1", "archsearch: 2", "this version reads format 1"),
    ("archsearch: 1\n", "", "write 'archsearch: 1' as the first line"),
    ("name: wide", "name: ../../etc", "expected letters, digits"),
    ("name: wide", "name: [wide]", "expected letters, digits"),
    ("trunk:", "trnk:", "trnk is no section; .*Did you mean 'trunk'"),
    ("kind: causal_lm", "kind: casual_lm", r"task\.kind is 'casual_lm'"),
    ("scales:\n", "scales: 3\nxscales:\n", "xscales is no section"),
    ("limit: 50", "limit: -1", r":42: objectives\[2\]\.limit is -1; expected a number above 0, in ms"),
    ("limit: 50", "limit: 0", r"objectives\[2\]\.limit is 0; expected a number above 0, in ms"),
    ("params(target) <= 6e9", "params(target) <= 6 GB", r":37: rules\[2\] .*takes parameters and bytes together"),
    ("dense: {kind: swiglu, expand: 8/3}", "dense: swiglu", r":15: ffns\.dense has no 'kind'; expected one of mlp, moe, none, swiglu\. Write {kind: swiglu}"),
    ("head_dim: 64, kv_groups: 2", "n_heads: 4", r"unknown key 'n_heads'; .* Write 'head_dim' \(heads fill expand x d_model\)\."),
    ("head_dim: 64, kv_groups: 2", "num_attention_heads: 4", "Write 'head_dim'"),
    ("head_dim: 64, kv_groups: 2", "num_key_value_heads: 4", r"Write 'kv_groups' \(query heads of a key/value head\)"),
    ("head_dim: 64, kv_groups: 2", "sliding_window: 4", "Write 'window'"),
    ("head_dim: 64, kv_groups: 2", "hidden_size: 4", "Write 'd_model' under scales"),
    ("kind: swiglu, expand: 8/3", "kind: swiglu, intermediate_size: 512", r"Write 'expand' \(hidden width / d_model\)"),
    ("kind: swiglu, expand: 8/3", "kind: moe, num_experts: 8", "Write 'n_experts'"),
    ("kind: swiglu, expand: 8/3", "kind: moe, num_experts_per_tok: 8", "Write 'top_k'"),
    ("n_blocks: 12", "n_layers: 12", "Write 'n_blocks'"),
    ("n_blocks: 12", "num_layers: 12", "Write 'n_blocks'"),
    ("context: 512", "seq_len: 512", "Write 'context'"),
    ("d_model: 256", "hidden_size: 256", "Write 'd_model'"),
    ("tokens: 4M", "learning_rate: 1e-3", "Write 'lr'"),
    ("tokens: 4M", "batch_size: 8", r"Write 'batch_tokens' \(tokens of one step\)"),
    ("trunk:", "learning_rate: 1e-3\ntrunk:", "learning_rate is no section; .* Write 'lr' under train"),
    ("tokens: 4M", "tokens: 4,000", r"unknown key '000'; .* Inside {\.\.\.} a comma ends a value: write 16000, 16k or 0\.5"),
    ("head_dim: 64, kv_groups: 2", "head_dim: {choise: [32, 64]}", r":12: mixers\.gqa\.head_dim is .*Did you mean 'choice'\?"),
    ("head_dim: 64, kv_groups: 2", "head_dim: {Choice: [32, 64]}", r"head_dim is .*Did you mean 'choice'\?"),
    ("head_dim: 64, kv_groups: 2", "head_dim: [32, 64]", r"head_dim is \[32, 64\]; .* write {choice: \[32, 64\]}"),
    ("kind: attention, head_dim: 64, kv_groups: 2", "kind: {choise: [attention, mla]}", r"mixers\.gqa\.kind is .*Did you mean 'choice'\?"),
    ("head_dim: 64, kv_groups: 2", "head_dim: ", r"mixers\.gqa\.head_dim is empty; expected a whole number"),
    ("choice: [1e-3, 3e-3]", "logrange: [1e-3, 3e-3]", r"train\.lr is .*Did you mean 'log_range'\?"),
    ("tokens: 4M", "warmup: 0.6, decay: 1/2", r":43: train warmup 0\.6 and decay 0\.5 overlap; .* add up to 1 at most"),
    ("limit: 50", "limit: 50 MB", r":42: objectives\[2\]\.limit is '50 MB'; expected a number of ms such as 5 or 5 ms"),
    ("limit: 50", "limit: fast", r"objectives\[2\]\.limit is 'fast'; expected a number of ms"),
    ("{span: 2}, {from", "{span: 2, from: middle}, {from", r":32: share\.kv has both span and from; expected one of them[^\n]*$"),
    ("{span: 2}, {from", "{}, {from", r"share\.kv has neither span nor from; expected one of them"),
    ("{mixer: full}", "{}", r":33: share\.weights has none of mixer, ffn and span; expected at least one"),
    ("choice: [1e-3, 3e-3]", "choice: [1e-3, 1e-3]", r":43: train\.lr\[1\] is '1e-3', which is an option already"),
    ("trial_timeout: 10 min", "device: gpu", r":45: runtime\.device is 'gpu'; expected cpu, cuda or cuda:<index>"),
    ("name: wide", "name: 2024", r":3: name is 2024; .*write it in quotes"),
    ("count(full) >= 1", "count(full) >= 1 && count(swa) >= 1", r":35: rules\[0\] .*cannot read '&& count.*; write 'and'"),
    ("count(full) >= 1", "params < 20M", r":35: rules\[0\] .*'params' stands alone .*; write params\(target\)"),
    ("count(full) >= 1", "count >= 1", r"'count' stands alone .*; write count\(\w+\)"),
    ("count(full) >= 1", "full >= 1", r"for how many blocks have it write count\(full\)"),
    ("count(full) >= 1", "decode_ms < 5", r"a function; to bound an objective, give it a limit: {name: decode_ms, limit: \.\.\.}"),
    ("rules:\n", " rules:\n", r":34: not valid YAML: .* indent this line as those it belongs to"),
    ("count(full) >= 1", "count(full) ≥ 1", "cannot read '≥ 1' .*; write '>='"),
    ("count(full) >= 1", 'count("full") >= 1', "; write names without quotes"),
    ("count(full) >= 1", "count(full) => 1", "found '=>', in .*; write '>=' to compare"),
    ("count(full) >= 1", "count(full) = 1", "found '=', in .*; write '==' to compare"),
    ("count(full) >= 1", "params(target) <= 3,000,000", "after a complete rule, .*; write 3000000 or 3M, without commas"),
    ("count(full) >= 1", "", r":35: rules\[0\] cannot be read: found nothing; expected a rule"),
    ("name: val_bpb, goal", "name:val_bpb, goal", r":40: .* Write a space after the colon: 'name: val_bpb'"),
    ("name: wide", "name:wide", r":3: not valid YAML: .*; write a colon and a space after a key"),
    ("  proxy:", "\u00a0 proxy:", r":7: not valid YAML: found a no-break space"),
    ("trunk: {norm: rmsnorm, norm_place: {choice: [pre, sandwich]}, tie_embeddings: true, residual: plain}", "trunk:", r":17: trunk is empty; write options below it, or leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_every_mistake_says_where_what_and_what_instead(old: str, new: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace.from_text(mutated(old, new))


@pytest.mark.parametrize(
    ("objective", "limit", "means"),
    [
        ("decode_ms", "50 ms", 50.0),
        ("decode_ms", "0.2 s", 200.0),
        ("decode_ms", "8/3", 8 / 3),
        ("params", "20M", 20e6),
        ("flops_per_token", "3 G", 3e9),
        ("state_bytes", "512 MiB", 2.0**29),
        ("val_bpb", "1.5e0", 1.5),
    ],
)
def test_limits_may_be_written_with_a_unit(objective: str, limit: str, means: float) -> None:
    text = mutated("{name: state_bytes}", f"{{name: {objective}, goal: min, limit: {limit}}}", TINY)
    goals = SearchSpace.from_text(text.replace("[{name: val_bpb}, ", "[")).objectives
    assert [goal.limit for goal in goals] == [pytest.approx(means)]


def test_all_mistakes_are_reported_at_once() -> None:
    text = mutated("head_dim: 64, kv_groups: 2", "head_dim: sixty").replace("count(full) >= 1", "count(ful) >= 1")
    with pytest.raises(SpaceError) as caught:
        SearchSpace.from_text(text.replace("schedule: wsd", "schedule: wds"))
    assert len(caught.value.problems) == 3


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 100) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choice", "range", "kind", "of", "pattern", "ratio", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
SECTION = st.sampled_from(
    [
        "name",
        "task",
        "scales",
        "mixers",
        "ffns",
        "trunk",
        "layout",
        "share",
        "rules",
        "objectives",
        "train",
        "search",
        "runtime",
    ]
)


@given(SECTION, SCRAPS)
@settings(deadline=None, max_examples=150)
def test_no_section_content_does_worse_than_a_space_error(section: str, scrap: object) -> None:
    import json

    kept, skipping = [], False
    for line in TINY.splitlines():
        if not line.startswith(" "):
            skipping = line.startswith(f"{section}:")
        if not skipping:
            kept.append(line)
    text = "\n".join(kept) + f"\n{section}: {json.dumps(scrap)}\n"
    try:
        SearchSpace.from_text(text).sample(RandomChooser(0))
    except SpaceError as error:
        assert all(problem.startswith("space.yaml") for problem in error.problems)  # noqa: PT017


def test_files_load_relative_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TINY)
    assert SearchSpace.load(tmp_path / "a.yaml").base_dir == tmp_path.resolve()


def test_loading_and_sampling_import_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom archsearch.space import SearchSpace\nfrom archsearch.check import check_space\n"
        f"check_space(SearchSpace.from_text({TINY!r}))\n"
        "assert not {'torch', 'optuna', 'ray', 'networkx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
