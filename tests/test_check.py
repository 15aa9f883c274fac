"""`check`: counts, samples and warnings, without training."""

import re
import sys
from pathlib import Path

import pytest
from spaces import TINY, WIDE

from archsearch import machine
from archsearch.architecture import dump
from archsearch.check import Check, check_space
from archsearch.choosers import RandomChooser, Uncountable, enumerate_space
from archsearch.data import open_corpus, pack
from archsearch.errors import SpaceError
from archsearch.notation import si
from archsearch.recipes import load_recipe
from archsearch.settings import Task, Train
from archsearch.space import SearchSpace
from archsearch.train import Plan


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check draws for more than half a second; what these spaces hold shows sooner, and on any machine alike."""
    monkeypatch.setattr("archsearch.check.MAX_SAMPLES", 80)


def test_a_small_space_is_counted_exactly() -> None:
    space = SearchSpace.from_text(TINY)
    found = check_space(space)
    ids = {c.architecture.arch_id for c in enumerate_space(space) if c is not None}
    assert found.counted
    assert found.distinct == len(ids)
    # kv_groups 2 x ratios 2 x places 2; ratio 1 and 3 at 4 blocks differ, so nothing coincides but what truly is equal
    assert found.distinct == 8
    assert found.smallest is not None
    assert found.largest is not None
    text = found.text()
    assert "8 distinct, counted one by one" in text
    assert "of state at 256 tokens" in text


def test_a_large_space_is_estimated() -> None:
    found = check_space(SearchSpace.from_text(WIDE.replace("rope_theta: {log_range: [1e4, 1e6]}", "rope_theta: 1e4")))
    assert not found.counted
    assert found.combinations > 1e4
    assert "estimated" in found.text()
    assert 0 < found.n_passed < found.n_samples
    assert any("mixer[0] != full" in rule for rule in found.refused_by)


def test_continuous_holes_have_no_count() -> None:
    space = SearchSpace.from_text(TINY.replace("expand: 2", "expand: {log_range: [1, 4]}"))
    with pytest.raises(Uncountable):
        list(enumerate_space(space))
    assert check_space(space).to_json()["combinations"] is None
    assert "without number" in check_space(space).text()


def test_impossible_rules_are_an_error() -> None:
    space = SearchSpace.from_text(TINY + "rules: [count(full) > 100]\n")
    with pytest.raises(SpaceError, match=r"no candidate passes the rules \(.*count\(full\) > 100"):
        check_space(space)


def test_a_window_as_long_as_the_proxy_is_warned_about() -> None:
    space = SearchSpace.from_text(TINY.replace("window: 1/4 context", "window: 100"))
    assert any("mixers.swa.window is 100 at the proxy's context of 64" in w for w in check_space(space).warnings)
    assert not check_space(SearchSpace.from_text(TINY)).warnings


RATIO = "{ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}"
STAGES = "{stages: [{of: 1/8, pattern: [full]}, {of: 7/8, pattern: [swa]}]}"


@pytest.mark.parametrize(
    ("old", "new", "more", "warning"),
    [
        ("n_blocks: 8, d_model: 64", "n_blocks: 2, d_model: 32", "", r"scales\.target \(2 .* is smaller than"),
        ("{name: val_bpb}", "{name: val_bpb, goal: max}", "", "val_bpb is to be large .* better the smaller"),
        (RATIO, "{blocks: [swa, full, full]}", "", r"layout\.mixer\.blocks lists 3 blocks and the proxy has 4"),
        (RATIO, "{blocks: [swa, full, full, swa]}", "", None),
        (RATIO, RATIO, "share: {kv: {span: 2}}", None),
        (RATIO, "{pattern: [swa]}", "share: {weights: {mixer: full}}", r"share\.weights joins no blocks"),
        (RATIO, STAGES, "", r"^mixers\.full stands at the target .* proxy of \d+ of \d+ .* the proxy more blocks$"),
        (RATIO, f"{{choice: [{RATIO}, {STAGES}]}}", "", r"not at the proxy of .* rule count\(full, proxy\) >= 1$"),
    ],
)  # fmt: skip
def test_what_is_odd_is_warned_about(old: str, new: str, more: str, warning: str | None) -> None:
    assert old in TINY
    told = check_space(SearchSpace.from_text(TINY.replace(old, new) + more)).warnings
    warnings = [each for each in told if "stands in no layout" not in each]  # a test of its own
    assert [bool(re.search(warning or "", found)) for found in warnings] == ([True] if warning else []), warnings


def test_caches_that_nothing_can_share_are_warned_about() -> None:
    text = TINY.replace("ffns:", "  both: {kind: parallel, of: [full, swa]}\nffns:").replace(RATIO, "both")
    (warning,) = check_space(SearchSpace.from_text(text + "share: {kv: {span: 2}}")).warnings
    assert warning.startswith("share.kv joins no blocks in any candidate looked at: ")


def test_what_no_layout_names_is_warned_about() -> None:
    text = TINY.replace("ffns:", "  spare: {kind: short_conv}\n  both: {kind: parallel, of: [full, swa]}\nffns:")
    assert check_space(SearchSpace.from_text(text)).warnings == [
        "mixers.spare stands in no layout.mixer, and is never used",
        "mixers.both stands in no layout.mixer, and is never used",
    ]
    used = check_space(SearchSpace.from_text(text.replace(RATIO, "{choice: [{pattern: [both]}, spare]}"))).warnings
    assert not [each for each in used if "no layout" in each]  # full and swa stand in both


def test_limits_that_the_layout_decides_are_kept() -> None:
    def limited(limit: str) -> SearchSpace:
        text = TINY.replace("d_model: 32", "d_model: 64")
        text = text.replace("{name: state_bytes}", f"{{name: state_bytes, limit: {limit}}}")
        return SearchSpace.from_text(text.replace("trials: 4", "trials: 4, seeds: 3, baselines: [transformer]"))

    free = check_space(limited("1 TiB"))
    assert free.n_passed == free.n_samples
    found = check_space(limited("400 KiB"))
    assert 0 < found.n_passed < found.n_samples
    assert found.refused_by["state_bytes <= 400 KiB"] == found.n_samples - found.n_passed
    (told,) = (each for each in found.warnings if "baseline transformer" in each)
    assert told.endswith("is beyond the limit 400 KiB: it is refused, and its 3 seeds measure no noise")
    with pytest.raises(SpaceError, match=r"passes the rules and limits \(.* state_bytes .* beyond the limit 1 B"):
        check_space(limited("1 B"))


def test_baselines_are_looked_at_too() -> None:
    with pytest.raises(SpaceError) as caught:
        check_space(SearchSpace.from_text(TINY.replace("trials: 4", "trials: 4, baselines: [transfomer, lfm2]")))
    unknown, unfit = caught.value.problems[:2]
    assert unknown.startswith("space.yaml:17: search.baselines[0]: unknown recipe 'transfomer'")
    assert "search.baselines[1]: baseline 'lfm2' does not fit the scales of space.yaml: lfm2.yaml:" in unfit


def test_knuths_estimate_is_near_the_truth() -> None:
    space = SearchSpace.from_text(TINY)
    total = 0.0
    for seed in range(50):
        chooser = RandomChooser(seed)
        space.sample(chooser)
        total += chooser.branching
    assert total / 50 == 8


def test_a_file_without_holes_is_one_architecture_drawn_once() -> None:
    found = check_space(load_recipe("transformer"))
    assert (found.n_samples, found.n_passed, found.distinct, found.counted) == (1, 1, 1, True)
    text = found.text()
    assert "architectures  1, and it passes" in text
    assert "random candidates" not in text
    assert text.count("32 blocks of width 4096") == 1
    fixed = TINY.replace("{choice: [1, 3]}", "1").replace("{choice: [even, first]}", "even")
    broken = fixed.replace("{choice: [1, 2]}", "1") + "rules: [count(full) > 100]\n"
    told = r"^space.yaml:18: no candidate passes the rules \(1 of 1: count\(full\) > 100 is false: 4 > 100\)$"
    with pytest.raises(SpaceError, match=told):
        check_space(SearchSpace.from_text(broken))


def test_mistakes_of_single_lines_are_no_statistics() -> None:
    text = TINY.replace("head_dim: 16, kv", "head_dim: {choice: [48, 96]}, kv")
    with pytest.raises(SpaceError) as caught:
        check_space(SearchSpace.from_text(text))
    assert [problem[:41] for problem in caught.value.problems] == ["space.yaml:8: mixers.full at proxy scale:"] * 2
    assert all("does not divide the width 32" in problem for problem in caught.value.problems)
    counts = [re.findall(r"\((\d+) of (\d+) candidates\)", problem)[0] for problem in caught.value.problems]
    assert sum(int(n) for n, _ in counts) == int(counts[0][1]) >= 20


def test_partly_fitting_options_are_told_by_their_line() -> None:
    text = TINY.replace("head_dim: 16, kv", "head_dim: {choice: [16, 48]}, kv")
    found = check_space(SearchSpace.from_text(text))
    assert 0 < found.n_passed < found.n_samples
    assert "fail: space.yaml:8: mixers.full at proxy scale: head_dim 48 does not divide" in found.text()


RATIO_OR_EACH = f"{{choice: [{RATIO}, {{each: [full, swa, odd]}}]}}"


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ("{kind: attention, head_dim: {choice: [48, 96]}}", r"at proxy scale, head_dim \d\d does not divide"),
        ("{kind: attention, head_dim: {choice: [48, 16]}}", None),  # one of its options does fit
        ("{kind: attention, head_dim: {choice: [16, 32]}}", None),
    ],
)
def test_a_mixer_that_never_fits_is_named_with_its_line(odd: str, why: str | None) -> None:
    text = TINY.replace(RATIO, RATIO_OR_EACH).replace("ffns:", f"  odd: {odd}\nffns:")
    found = check_space(SearchSpace.from_text(text))
    told = [warning for warning in found.warnings if "odd" in warning]
    assert len(told) == (why is not None)
    if why is not None:
        n = found.used["mixers", "odd"]
        named = rf"mixers\.odd \(space\.yaml:10\) fits in none of the {n} candidates looked at that use it, and they"
        assert re.match(named + rf" are never trained: {why}", told[0]), told
        assert n < found.n_samples


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("nope/*.txt", r"space\.yaml:1: task\.corpus cannot be used: .*nope"),
        ("buitlin", r"space\.yaml:1: task\.corpus cannot be used: .*Did you mean 'builtin'"),
    ],
)
def test_a_corpus_that_is_not_there_is_refused(corpus: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=message):
        check_space(SearchSpace.from_text(f"task: {{corpus: '{corpus}'}}" + TINY, base_dir=tmp_path))


def test_corpora_that_are_there_are_found(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words, again and again\n" * 500)
    pack("text.txt", "bytes", tmp_path, tmp_path / "packed")
    for corpus in ("text.txt", "*.txt", "packed"):
        assert check_space(SearchSpace.from_text(f"task: {{corpus: '{corpus}'}}" + TINY, base_dir=tmp_path)).n_passed


@pytest.mark.parametrize(
    ("train", "warning"),
    [
        ("tokens: 4096, batch_tokens: 8192", "train.tokens is 4,096, less than one step: 8,192 tokens are trained on"),
        ("batch_tokens: 50", "train.batch_tokens is 50, below the proxy's context of 64: a step takes one row, 64"),
        ("batch_tokens: 100", "no multiple of the proxy's context of 64: a step takes whole rows, 64 tokens"),
        ("val_tokens: 10", "train.val_tokens is 10, below the proxy's context of 64: one row is judged"),
    ],
)
def test_numbers_of_a_training_that_do_not_go_together(train: str, warning: str) -> None:
    text = TINY.replace("tokens: 4096, batch_tokens: 256, val_tokens: 1024, lr: 3e-3", train)
    assert any(warning in told for told in check_space(SearchSpace.from_text(text)).warnings)


def test_what_a_trial_trains_on_is_told_as_it_will_be() -> None:
    text = TINY.replace("tokens: 4096, batch_tokens: 256, val_tokens: 1024", "tokens: 10k, batch_tokens: 100")
    found = check_space(SearchSpace.from_text(text))
    assert "training       10k tokens a trial in 157 steps of 64, judged on 10k held-out tokens" in found.text()
    (told,) = found.to_json()["training"]
    plan = Plan.of(Train(tokens=10_000, batch_tokens=100), 64)
    assert (told["tokens_per_step"], told["steps"]) == (plan.tokens_per_step, plan.total_steps)
    ranged = text.replace("batch_tokens: 100", "batch_tokens: {choice: [64, 128]}")
    assert "in 79 to 157 steps of 64 to 128, judged" in check_space(SearchSpace.from_text(ranged)).text()


def test_held_out_tokens_are_those_that_the_corpus_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n\n".join(f"some words, {i} times, again and again" for i in range(900)))
    text = "task: {corpus: text.txt}\n" + TINY.replace("val_tokens: 1024", "val_tokens: 50k")

    def found() -> Check:
        return check_space(SearchSpace.from_text(text, base_dir=tmp_path))

    counted = found()
    assert not (tmp_path / "cache").exists()  # nothing was packed for it
    corpus = open_corpus(Task(corpus="text.txt"), tmp_path)
    assert counted.held_out == corpus.n_val_tokens < 50_000
    told = f"judged on all {si(corpus.n_val_tokens)} held-out tokens that the corpus has (val_tokens: 50k)"
    assert told in counted.text()
    assert found().to_json()["held_out_tokens"] == corpus.n_val_tokens  # as the cache has it
    (tmp_path / "packed").mkdir()
    pack("text.txt", "bytes", tmp_path, tmp_path / "packed")
    text = text.replace("text.txt", "packed").replace("50k", "100")
    assert found().held_out == corpus.n_val_tokens
    assert "judged on 100 held-out tokens" in found().text()


def test_a_large_corpus_is_not_read_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules["archsearch.data.pack"], "SMALL", 999)
    (tmp_path / "text.txt").write_text("some words, again and again\n" * 500)
    text = "task: {corpus: text.txt}\n" + TINY.replace("val_tokens: 1024", "val_tokens: 50k")
    assert "judged on 50k held-out tokens" in check_space(SearchSpace.from_text(text, base_dir=tmp_path)).text()


def test_val_tokens_follow_tokens_unless_they_are_written() -> None:
    assert Train(tokens=10_000).val_tokens == 10_000
    assert Train().val_tokens == Train(tokens=4_000_000).val_tokens == 262_144
    assert Train(tokens=10_000, val_tokens=50_000).val_tokens == 50_000
    for train in (Train(), Train(tokens=10_000), Train(tokens=10_000, val_tokens=20_000)):
        assert Train.model_validate(dump(train)) == train


TARGET = "target: {n_blocks: 8, d_model: 64, context: 256, vocab_size: 512, dtype: float32}"
TIMED = TINY.replace("{name: state_bytes}", "{name: decode_ms}")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "memory", lambda of_gpu=False: 20 * 2**30)


@pytest.mark.usefixtures("no_gpu")
def test_what_this_machine_cannot_hold_is_warned_about() -> None:
    jamba = check_space(load_recipe("jamba"))
    assert "memory         96.1 GiB of weights at target scale (bfloat16)" in jamba.text()
    assert jamba.warnings == [
        "the weights take 96.1 GiB at target scale, this machine has 20 GiB of memory: "
        "decode_ms cannot be measured here"
    ]
    wide = TIMED.replace(TARGET, "target: {n_blocks: 32, d_model: 4096, context: 256, dtype: float32}")
    (warning,) = check_space(SearchSpace.from_text(wide.replace("expand: 2}", "expand: {choice: [1/4, 4]}}"))).warnings
    assert warning.startswith("the weights of the largest that passes take")
    elsewhere = load_recipe("jamba").source.text + "runtime: {runner: ray}\n"
    assert not check_space(SearchSpace.from_text(elsewhere)).warnings
    untimed = wide.replace("{name: decode_ms}", "{name: params}")
    assert not check_space(SearchSpace.from_text(untimed)).warnings, "the target is never built"


@pytest.mark.usefixtures("no_gpu")
def test_half_precision_on_a_cpu_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    space = SearchSpace.from_text(TIMED.replace(", dtype: float32", ""))
    (warning,) = check_space(space).warnings
    assert warning.startswith("what is measured at target scale (decode_ms) is bfloat16, which CPUs are slow in")
    assert "scales.target.dtype: float32" in warning
    assert not check_space(SearchSpace.from_text(TIMED)).warnings
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert not check_space(space).warnings
    on_cpu = TIMED.replace(", dtype: float32", "") + "runtime: {device: cpu}\n"
    assert len(check_space(SearchSpace.from_text(on_cpu)).warnings) == 1
