"""Which ptxas is used on Hopper, and how its lost registers are found in machine code."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import triton

from archsearch_kernels import assembler

BAD = """
        /*1b80*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8].tnspA, R24 ;
        /*1b90*/                   UIADD3 UR4, UP0, UR7, 0x20, URZ ;
        /*1bb0*/                   UIADD3.X UR5, UR7, -0x3ffffff0, URZ, UP0, !UPT ;
"""
DEFINED = """
        /*0010*/                   UMOV UR7, 0x400 ;
        /*0020*/                   ULDC.64 UR8, c[0x0][0x208] ;
        /*0030*/                   ULDC.64 UR10, c[0x0][0x210] ;
"""


def test_a_register_that_nothing_writes_is_found() -> None:
    found = assembler.lost_registers(BAD)
    assert [line.split()[0] for line in found] == ["1b80", "1b90", "1bb0"]
    assert assembler.lost_registers(DEFINED + BAD) == []
    without = DEFINED.replace("UR7, 0x400", "UR6, 0x400")
    assert [line.split()[0] for line in assembler.lost_registers(without + BAD)] == ["1b90", "1bb0"]


def use(monkeypatch: pytest.MonkeyPatch, usual: str, newer: str | None) -> None:
    tools = {"ptxas": SimpleNamespace(version=usual, path="/usual")}
    if newer is not None:
        tools["ptxas_blackwell"] = SimpleNamespace(version=newer, path="/newer")
    monkeypatch.setattr(triton.knobs, "nvidia", SimpleNamespace(**tools))
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    assembler.prefer_a_sound_one.cache_clear()


@pytest.mark.parametrize(
    ("usual", "newer", "capability", "expected"),
    [
        ("12.8", "12.9", (9, 0), "/newer"),
        ("12.8", "12.9", (8, 0), None),  # no wgmma there
        ("12.9", "13.0", (9, 0), None),
        ("12.8", "12.8", (9, 0), None),
        ("12.8", None, (9, 0), None),
    ],
)
def test_the_newer_one_is_taken_where_the_usual_one_is_unsound(
    monkeypatch: pytest.MonkeyPatch, usual: str, newer: str | None, capability: tuple[int, int], expected: str | None
) -> None:
    use(monkeypatch, usual, newer)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # so that what is set is taken back
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    assembler.prefer_a_sound_one(capability)
    assert os.environ.get("TRITON_PTXAS_PATH") == expected


def test_a_choice_of_the_users_own_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "12.8", "12.9")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/mine")
    assembler.prefer_a_sound_one((9, 0))
    assert os.environ["TRITON_PTXAS_PATH"] == "/mine"
