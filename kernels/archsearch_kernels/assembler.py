"""The assembler for Hopper: ptxas 12.8, which triton 3.6 brings, loses wgmma descriptors; 12.9 lies beside it.

Found in the machine code of the 16-bit kernels that gave wrong numbers or illegal accesses on an H100 (docs/log.md): a
uniform register that makes up a shared-memory descriptor is read and never written, though the PTX is right.
`lost_registers` looks for that, so the tuner drops such a configuration, whatever the assembler.
"""

from __future__ import annotations

import logging
import os
import re
from functools import cache

log = logging.getLogger("archsearch_kernels")
SOUND = (12, 9)  # from this version on


@cache
def prefer_a_sound_one(capability: tuple[int, int]) -> None:
    """On Hopper, before anything is compiled: let triton use its newer ptxas if its usual one is unsound.

    TRITON_PTXAS_PATH, if set, stands. Processes started later inherit the choice.
    """
    if capability[0] != 9 or "TRITON_PTXAS_PATH" in os.environ:
        return
    from triton import knobs

    usual, newer = knobs.nvidia.ptxas, getattr(knobs.nvidia, "ptxas_blackwell", None)
    if newer is None or _version(usual.version) >= SOUND or _version(newer.version) < SOUND:
        return
    os.environ["TRITON_PTXAS_PATH"] = newer.path
    log.info("ptxas %s loses wgmma descriptors on Hopper; compiling with %s", usual.version, newer.version)


def is_sound() -> bool:
    """Whether the assembler that Triton calls on Hopper now loses no descriptors, as far as is known."""
    from triton import knobs

    return _version(knobs.nvidia.ptxas.version) >= SOUND


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def lost_registers(sass: str) -> list[str]:
    """Instructions (of `cuobjdump -sass`) that read a uniform register which no instruction before them writes.

    Branches are not followed: a value written only behind a backward jump would be reported too.
    """
    written: set[int] = set()
    lost = []
    for line in sass.splitlines():
        found = re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);", line)
        if found is None:
            continue
        address, op, operands = found[1], found[2], [part.strip() for part in found[3].split(",")]
        target: set[int] = set()
        if re.fullmatch(r"UR\d+", operands[0]):
            first = int(operands[0][2:])
            target = set(range(first, first + _width(op)))
            operands = operands[1:]
        reads = {n for operand in operands for n in _reads(op, operand, operands)}
        if reads - written:
            lost.append(f"{address} {op} {found[3]}")
        written |= target
    return lost


def _width(op: str) -> int:
    if ".128" in op:
        return 4
    return 2 if ("WIDE" in op or ".64" in op) and "HI" not in op else 1


def _reads(op: str, operand: str, operands: list[str]) -> set[int]:
    """Uniform registers of one operand."""
    reads: set[int] = set()
    for n in map(int, re.findall(r"UR(\d+)", operand)):
        if "gdesc" in operand:  # with the other operand in registers, only the second half is a descriptor
            in_registers = len(operands) > 1 and re.fullmatch(r"R\d+", operands[1]) is not None
            reads |= set(range(n + 2 if in_registers else n, n + 4))
        elif "desc[" in operand:
            reads |= {n, n + 1}
        else:
            pair = op.startswith("U") and ".64" in op and "HI" not in op and not op.startswith("USH")
            reads |= {n, n + 1} if pair else {n}
    return reads
