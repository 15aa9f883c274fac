"""Packs: the winners of a tuning table as one file, to ship, to share, to take elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from archsearch_kernels.tuner.identity import Device
from archsearch_kernels.tuner.lookup import FORMAT, pack, refresh, user_table
from archsearch_kernels.tuner.store import Row, Table, slim, winners


def write_pack(rows: Sequence[Row], path: Path) -> int:
    """Write the winners among `rows`; returns how many there are."""
    best = sorted((slim(r) for r in winners(rows)), key=lambda r: (r.op, r.kernel, r.dtypes, str(r.flags), r.bucket))
    lines = ",\n".join(row.to_json() for row in best)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(f'{{"format": {FORMAT}, "rows": [\n{lines}\n]}}\n')
    beside.replace(path)
    return len(best)


def export_table(of: Device, path: Path) -> int:
    """Write what this user has measured on a device as a pack."""
    return write_pack(list(Table.open(user_table(of)).rows.values()), path)


def import_pack(path: Path) -> int:
    """Add a pack's rows to this user's tables, of whatever devices they are; returns how many.

    Raises ValueError if there is no such file, or it is no pack.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    rows = pack(path)
    for device in {row.device for row in rows}:
        table = Table.open(user_table(device))
        fresh = [row for row in rows if row.device == device and row.identity not in table.rows]
        if fresh:
            table.append(fresh)
    refresh()
    return len(rows)
