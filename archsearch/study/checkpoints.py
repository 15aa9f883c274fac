"""Which checkpoints stay on disk: those of the front and the baselines, so that a study's folder stays small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from archsearch.pareto import front, to_minimise
from archsearch.settings import Runtime
from archsearch.store import RunFolder, TrialRecord


def prune_checkpoints(
    folder: RunFolder,
    records: Sequence[TrialRecord],
    axes: Mapping[str, Literal["min", "max"]],
    runtime: Runtime,
    busy: set[int],
) -> None:
    """Delete checkpoints nobody needs any more.

    axes: name to direction. busy: trials still on their way, which keep theirs.
    """
    if runtime.keep_checkpoints == "all":
        return
    paths = (folder.path / "checkpoints").glob("*.safetensors")
    found = {int(path.stem): path for path in paths if path.stem.isdigit()}
    if found.keys() <= busy:
        return
    complete = [record for record in records if record.status == "complete" and record.repeat_of is None]
    kept = set(busy)
    if runtime.keep_checkpoints == "front" and complete:
        rows = [[record.objectives[axis].value for axis in axes] for record in complete]
        kept |= {complete[i].trial for i in front(to_minimise(rows, list(axes.values())))}
        kept |= {record.trial for record in complete if record.name is not None}
    for trial in found.keys() - kept:
        found[trial].unlink(missing_ok=True)
