"""An objective as a package of one's own may add it: the bytes of weights that one decoded token reads."""

from __future__ import annotations

from archsearch import cost
from archsearch.architecture import DTYPE_BYTES, ModelSpec
from archsearch.objectives import Objective, Reading
from archsearch.settings import Goal


def _read(model: ModelSpec, goal: Goal, repeats: int) -> Reading:
    return Reading(cost.active_params(model) * DTYPE_BYTES[model.dtype])


ACTIVE_BYTES = Objective(
    "active_bytes",
    "bytes",
    "min",
    stage="graph",
    scale="target",
    read=_read,
    what="weights that a token passes through",
)
