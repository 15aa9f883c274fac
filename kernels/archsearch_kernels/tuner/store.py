"""The tuning table: one row per kernel, launch key and configuration, appended to a file that many processes share.

A row is a JSON line, written in one call under a file lock. A line that a killed process left half written is passed
over; the next append starts a new line. The last row of a (key, configuration) counts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

from archsearch_kernels.launch import Config
from archsearch_kernels.tuner.identity import Compiler, Device

OK = "ok"
BAD = ("wrong", "nondeterministic", "resources", "timeout", "crash")
VERDICTS = (OK, "slow", "untimed", *BAD)


@dataclass(frozen=True)
class Row:
    """One configuration of one kernel for one kind of launch on one kind of GPU, and what became of it.

    verdict: `ok` (checked against the reference, outputs and gradients, and bit-equal when repeated), `slow` (lost on
    time before it was checked), `untimed` (ranked too low for a quick search), `wrong`, `nondeterministic`,
    `resources` (does not compile, spills or does not fit), `timeout`, `crash`. Times are microseconds over `n` runs.
    """

    op: str
    kernel: str
    code: str
    device: Device
    compiler: Compiler
    dtypes: tuple[str, ...]
    flags: tuple[tuple[str, Any], ...]
    bucket: tuple[tuple[str, int], ...]
    config: tuple[tuple[str, int], ...]
    verdict: str
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    n: int = 0
    position: int = 0  # in the kernel's list of candidates, the canonical one first
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    error: float | None = None  # root mean square against the reference, relative
    note: str = ""
    date: str = ""

    @property
    def group(self) -> tuple[Any, ...]:
        """What a nearby bucket must agree on."""
        return self.kernel, self.code, self.device, self.dtypes, self.flags

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a later row replaces."""
        return *self.group, self.compiler, self.bucket, self.config

    def to_json(self) -> str:
        """One line."""
        data = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        for name in ("flags", "bucket", "config"):
            data[name] = dict(data[name])
        return json.dumps(data)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The inverse. Raises ValueError (or a subclass) for anything else."""
        data = json.loads(line)
        try:
            return cls(
                **{
                    **data,
                    "device": Device(**data["device"]),
                    "compiler": Compiler(**data["compiler"]),
                    "dtypes": tuple(data["dtypes"]),
                    **{name: tuple(data[name].items()) for name in ("flags", "bucket", "config")},
                }
            )
        except (TypeError, KeyError, AttributeError) as problem:
            raise ValueError(f"not a row of a tuning table: {problem}") from problem


def frozen(config: Config) -> tuple[tuple[str, int], ...]:
    """A configuration as part of a row."""
    return tuple(config.items())


@dataclass
class Table:
    """A file of rows, and what is known from it."""

    path: Path
    rows: dict[tuple[Any, ...], Row] = field(default_factory=dict)
    damaged: int = 0  # lines that are no rows

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read what is there; a missing file is an empty table."""
        table = cls(path)
        if path.exists():
            table._read(path.read_text(errors="replace").splitlines())
        return table

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = Row.from_json(line)
            except ValueError:
                self.damaged += 1
            else:
                self.rows[row.identity] = row

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows, durably; other processes may be doing the same."""
        with _locked(self.path) as file:
            file.seek(0, os.SEEK_END)
            start = file.tell()
            if start:
                file.seek(start - 1)
                if file.read(1) != b"\n":  # somebody was killed while writing
                    file.write(b"\n")
            file.write("".join(row.to_json() + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.update((row.identity, row) for row in rows)


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


def winners(rows: Iterable[Row], tie: float = 1.02) -> list[Row]:
    """The best checked row of each group and bucket; among those within `tie` of the fastest, the canonical first."""
    best: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.verdict == OK and row.median_us is not None:
            best.setdefault((*row.group, row.compiler, row.bucket), []).append(row)
    found = []
    for rivals in best.values():
        fastest = min(r.median_us or 0.0 for r in rivals)
        tied = [r for r in rivals if (r.median_us or 0.0) <= tie * fastest]
        found.append(min(tied, key=lambda r: r.position))
    return found


def slim(row: Row) -> Row:
    """A row as a pack holds it."""
    return replace(row, note="", date=row.date[:10])
