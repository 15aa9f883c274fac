"""Model folders in the words of others: stock classes of transformers and fla, whose own code runs the weights.

A dialect is one file with one `Dialect` (see `base`) and one line in the table below. It says for each block which
part of the stock class it becomes; what the class cannot express exactly is refused with the block that stops it.
`folder` writes, `parity` compares with the search model before anything is kept.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archsearch.export.dialects.base import Dialect

DIALECTS = {
    "falcon_h1": "archsearch.export.dialects.falcon_h1:FalconH1",
    "fla": "archsearch.export.dialects.fla:Fla",
    "gemma3": "archsearch.export.dialects.gemma3:Gemma3",
    "jamba": "archsearch.export.dialects.jamba:Jamba",
    "lfm2": "archsearch.export.dialects.lfm2:Lfm2",
    "lfm2_moe": "archsearch.export.dialects.lfm2_moe:Lfm2Moe",
    "qwen3_next": "archsearch.export.dialects.qwen3_next:Qwen3Next",
}


def dialect(name: str) -> Dialect:
    """The dialect of this name, one of DIALECTS."""
    module, _, made = DIALECTS[name].partition(":")
    found: Dialect = getattr(importlib.import_module(module), made)()
    return found
