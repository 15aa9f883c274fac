"""The tuning table survives other writers, kills and damage; lookups go from what was measured here to what is near."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from demo_kernels import CONFIGS, demo_scale

from archsearch_kernels.launch import Key
from archsearch_kernels.tuner import identity, known_bad, lookup
from archsearch_kernels.tuner.identity import Compiler, Device, code_hash
from archsearch_kernels.tuner.packs import export_table, import_pack, write_pack
from archsearch_kernels.tuner.store import Row, Table, frozen, winners

H100 = Device("NVIDIA H100 80GB HBM3", "9.0", 132, 52428800, 232448, 79)
H200 = Device("NVIDIA H200", "9.0", 132, 62914560, 232448, 140)
A100 = Device("NVIDIA A100", "8.0", 108, 41943040, 166912, 80)
TRITON = Compiler("3.6.0", "12.8.93")
KEY = Key("demo_scale", ("bfloat16", "bfloat16"), (("D", 64),), (("T", 1024),))


def row(median: float = 10.0, config: int = 0, **changes: object) -> Row:
    base = Row(
        op="demo",
        kernel="demo_scale",
        code=code_hash(demo_scale.python),
        device=H100,
        compiler=TRITON,
        dtypes=KEY.dtypes,
        flags=KEY.flags,
        bucket=KEY.bucket,
        config=frozen(CONFIGS[config]),
        position=config,
        verdict="ok",
        median_us=median,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ARCHSEARCH_TUNE_DIRS", raising=False)
    monkeypatch.setattr(lookup, "PACKS", tmp_path / "packs")
    monkeypatch.setattr(lookup, "compiler", lambda: TRITON)
    lookup.refresh()


def explain(key: Key = KEY, on: Device = H100) -> lookup.Answer | None:
    lookup.refresh()
    return lookup.explain(demo_scale, key, CONFIGS, on)


def test_a_row_survives_json() -> None:
    full = row(error=0.001, registers=40, spills=0, shared=1024, p20_us=9.0, p80_us=11.0, n=30, note="x", date="2026")
    assert Row.from_json(full.to_json()) == full
    assert Row.from_json(row(flags=(("D", 64), ("b", None), ("HAS", True))).to_json()).flags[1:] == (
        ("b", None),
        ("HAS", True),
    )
    for bad in ("{}", "[]", '{"op": 1}'):
        with pytest.raises(ValueError, match="not a row of a tuning table"):
            Row.from_json(bad)


def test_a_half_written_line_costs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    Table.open(path).append([row(config=0), row(config=1)])
    whole = path.read_bytes()
    path.write_bytes(whole + row(config=2).to_json().encode()[:50])
    table = Table.open(path)
    assert (len(table.rows), table.damaged) == (2, 1)
    table.append([row(config=2)])
    again = Table.open(path)
    assert (len(again.rows), again.damaged) == (3, 1)


def test_the_last_row_of_a_configuration_counts(tmp_path: Path) -> None:
    table = Table.open(tmp_path / "t.jsonl")
    table.append([row(10.0), row(7.0)])
    (kept,) = Table.open(table.path).rows.values()
    assert kept.median_us == 7.0


def _write(path: str, writer: int) -> None:
    table = Table.open(Path(path))
    for i in range(50):
        table.append([row(bucket=(("T", 1 << i), ("W", writer)))])


def test_many_processes_append_to_one_table(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(path), w)) for w in range(4)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    table = Table.open(path)
    assert (len(table.rows), table.damaged) == (200, 0)


def test_ties_go_to_the_canonical_configuration() -> None:
    (best,) = winners([row(10.0, 2), row(10.1, 0), row(9.95, 1)])
    assert best.position == 0
    (best,) = winners([row(10.0, 2), row(10.5, 0)])
    assert best.position == 2
    assert winners([row(1.0, 1, verdict="wrong"), row(2.0, 2, verdict="slow")]) == []


def test_levels_from_measured_to_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain() is None
    lookup.PACKS.mkdir()
    write_pack([row(config=2, device=H200)], lookup.PACKS / f"{H200.slug}.json")
    answer = explain()
    assert answer is not None
    assert (answer.config, answer.source) == (CONFIGS[2], "pack of nvidia-h200, near")
    assert explain(on=A100) is None  # another capability says nothing
    write_pack([row(config=1, bucket=(("T", 4096),))], lookup.PACKS / f"{H100.slug}.json")
    answer = explain()
    assert answer is not None
    assert (answer.config, answer.source, answer.steps) == (CONFIGS[1], "pack, near", 2.0)
    shared = tmp_path / "team"
    Table.open(shared / f"{H100.slug}.jsonl").append([row(config=2)])
    monkeypatch.setenv("ARCHSEARCH_TUNE_DIRS", str(shared))
    answer = explain()
    assert answer is not None
    assert (answer.config, answer.source) == (CONFIGS[2], f"shared ({shared})")
    Table.open(lookup.user_table(H100)).append([row(config=1)])
    answer = explain()
    assert answer is not None
    assert (answer.config, answer.source) == (CONFIGS[1], "measured")


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "0" * 12},
        {"dtypes": ("float32", "float32")},
        {"flags": (("D", 128),)},
        {"verdict": "slow"},
        {"bucket": (("N", 1024),)},
    ],
)
def test_rows_of_other_code_or_launches_say_nothing(changes: dict[str, object]) -> None:
    Table.open(lookup.user_table(H100)).append([row(**changes)])  # type: ignore[arg-type]
    assert explain() is None


def test_what_was_wrong_is_no_default_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(lookup.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lookup, "device", lambda: H100)
    assert lookup.default(demo_scale, KEY, CONFIGS) == CONFIGS[0]
    Table.open(lookup.user_table(H100)).append([row(config=0, verdict="wrong", bucket=(("T", 64),))])
    lookup.refresh()
    assert lookup.default(demo_scale, KEY, CONFIGS) == CONFIGS[1]
    Table.open(lookup.user_table(H100)).append([row(config=i, verdict="crash") for i in (1, 2, 3)])
    lookup.refresh()
    assert lookup.default(demo_scale, KEY, CONFIGS) == CONFIGS[0]


def test_a_configuration_that_is_no_candidate_any_more_is_passed_over() -> None:
    Table.open(lookup.user_table(H100)).append([replace(row(), config=(("BM", 999),))])
    assert explain() is None


def test_another_compilers_row_is_only_near() -> None:
    Table.open(lookup.user_table(H100)).append([row(config=1, compiler=Compiler("3.7.1", "13.0"))])
    answer = explain()
    assert answer is not None
    assert answer.source == "measured, near"


def test_known_bad_configurations_are_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = known_bad.Rule("demo_*", {"BM": 32}, "9.0", since=(12, 3), before=(12, 9))
    monkeypatch.setattr(known_bad, "RULES", (rule,))
    Table.open(lookup.user_table(H100)).append([row(config=1)])
    assert explain() is None
    for ptxas, taken in (("12.9.86", True), ("12.2.140", True), ("12.3.52", False), ("13.0.88", True)):
        monkeypatch.setattr(lookup, "compiler", lambda ptxas=ptxas: Compiler(TRITON.triton, ptxas))
        assert (explain() is not None) == taken, ptxas


def test_an_assembler_of_unknown_version_is_no_safer() -> None:
    config = {"BV": 16, "num_warps": 8, "num_stages": 1}
    bad = {
        v: known_bad.is_known_bad("kda_walk", config, H100, Compiler("3.6.0", v))
        for v in ("12.8.93", "12.9.86", "unknown")
    }
    assert bad == {"12.8.93": True, "12.9.86": False, "unknown": True}
    assert not known_bad.is_known_bad("kda_walk", {**config, "num_stages": 2}, H100, Compiler("3.6.0", "12.8.93"))


def test_a_pack_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Table.open(lookup.user_table(H100)).append([row(10.0, 0), row(5.0, 1), row(1.0, 2, verdict="wrong")])
    path = tmp_path / "pack.json"
    assert export_table(H100, path) == 1
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "elsewhere"))
    assert import_pack(path) == 1
    answer = explain()
    assert answer is not None
    assert (answer.config, answer.source) == (CONFIGS[1], "measured")
    assert import_pack(path) == 1
    assert len(Table.open(lookup.user_table(H100)).rows) == 1
    with pytest.raises(ValueError, match="does not exist"):
        import_pack(tmp_path / "none.json")
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="not a tuning pack of format 1"):
        import_pack(path)


def test_the_mode_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_TUNE", "fast")
    with pytest.raises(ValueError, match="'fast'; expected off, cached, quick or full"):
        lookup.mode()


def test_the_code_hash_sees_helpers_and_constants_but_no_comments(tmp_path: Path) -> None:
    same = texts(tmp_path, 1)
    assert texts(tmp_path, 2, doc="Other words.", tail="  # and a comment") == same
    assert texts(tmp_path, 3, helper="x * FACTOR * FACTOR") != same
    assert texts(tmp_path, 4, constant="tl.constexpr(3.0)") != same
    assert len(code_hash(demo_scale.python)) == 12


def texts(folder: Path, n: int, doc: str = "y", helper: str = "x * FACTOR", constant: str = "", tail: str = "") -> Any:
    """What the hash of a variant of the demo kernel is made of, its number taken out of its name."""
    source = (Path(__file__).parent.parent / "demo_kernels.py").read_text().replace("demo_scale", f"demo_{n}")
    source = source.replace("y [T, D] = 2 x + OFF.", doc).replace("x * FACTOR", helper + tail)
    source = source.replace("tl.constexpr(2.0)", constant or "tl.constexpr(2.0)")
    path = folder / f"demo_{n}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, path.stem)
    return {text.replace(path.stem, "demo") for text in identity._texts(kernel.python, {})}
