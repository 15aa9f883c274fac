"""Layouts as the report shows them, read from plain JSON, so that kinds this installation lacks can be drawn too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archsearch.notation import run_length


@dataclass(frozen=True)
class BlockView:
    """One block. `mixer` is a key of the palette; `branches` has several for a parallel mixer."""

    mixer: str
    mixer_name: str
    branches: tuple[str, ...]
    ffn: str
    ffn_name: str
    is_moe: bool
    kv_from: int | None = None
    mixer_weights_from: int | None = None
    ffn_weights_from: int | None = None


def read_blocks(model: Mapping[str, Any]) -> list[BlockView]:
    """The blocks of a ModelSpec's JSON."""
    return [_read(block) for block in model.get("blocks", ())]


def _read(block: Mapping[str, Any]) -> BlockView:
    mixer, ffn = block.get("mixer", {}), block.get("ffn", {})
    kind = mixer_kind(mixer)
    ffn_kind = str(ffn.get("kind", "?"))
    parts = mixer.get("of") if kind == "parallel" else None
    return BlockView(
        mixer=kind,
        mixer_name=str(block.get("mixer_name") or kind),
        branches=tuple(mixer_kind(part) for part in parts) if parts else (kind,),
        ffn=ffn_kind,
        ffn_name=str(block.get("ffn_name") or ffn_kind),
        is_moe=ffn_kind == "moe" or "n_experts" in ffn,
        kv_from=block.get("kv_from"),
        mixer_weights_from=block.get("mixer_weights_from"),
        ffn_weights_from=block.get("ffn_weights_from"),
    )


def mixer_kind(mixer: Any) -> str:
    """The palette's key for a mixer: its kind, and whether softmax attention sees a window only."""
    if not isinstance(mixer, Mapping):
        return str(mixer)
    kind = str(mixer.get("kind", "?"))
    return "attention, windowed" if kind == "attention" and mixer.get("window") is not None else kind


def describe(model: Mapping[str, Any]) -> str:
    """The layout in one line, mixers, ffns, sharing: `12x(gdn gdn gdn full) | dense 47xmoe | kv reused by 24`."""
    blocks = read_blocks(model)
    parts = [run_length([b.mixer_name for b in blocks]), run_length([b.ffn_name for b in blocks])]
    shared = {
        "kv reused by": sum(b.kv_from is not None for b in blocks),
        "mixer weights reused by": sum(b.mixer_weights_from is not None for b in blocks),
        "ffn weights reused by": sum(b.ffn_weights_from is not None for b in blocks),
    }
    return " | ".join([*parts, *(f"{what} {count}" for what, count in shared.items() if count)])


def headline(architecture: Mapping[str, Any]) -> str:
    """The mixers at target scale (or the only scale there is), in a few words."""
    model: Mapping[str, Any] = architecture.get("target") or next(iter(architecture.values()), {})
    return run_length([block.mixer_name for block in read_blocks(model)])


def letters(names: Sequence[str]) -> dict[str, str]:
    """A mark of one or two characters for each name, distinct as far as two characters go: full F, fast Fa, gdn G."""
    marks: dict[str, str] = {}
    for name in dict.fromkeys(names):
        head = name[:1].upper() or "?"
        options = [head, *(head + c for c in name[1:]), *(head + str(k) for k in range(2, 10))]
        marks[name] = next((mark for mark in options if mark not in marks.values()), head)
    return marks
