"""Whether a tokenizer gives text back. What it drops no model has to predict: bits per byte then come out too low."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

PIECE = 1000  # bytes of a document that are tried
PIECES = 64  # documents of a chunk that are
ALLOWED = 0.01  # share of pieces that may come back changed: a tokenizer may compose characters


@dataclass(frozen=True)
class RoundTrip:
    """How many pieces of text were encoded and decoded, how many came back changed; their tokens, unknown ones."""

    pieces: int = 0
    changed: int = 0
    tokens: int = 0
    unknown: int = 0

    def __add__(self, other: RoundTrip) -> RoundTrip:
        return RoundTrip(
            self.pieces + other.pieces,
            self.changed + other.changed,
            self.tokens + other.tokens,
            self.unknown + other.unknown,
        )

    @property
    def is_lossy(self) -> bool:
        """Whether more than ALLOWED of the pieces came back changed."""
        return self.changed > ALLOWED * self.pieces

    def text(self, name: str) -> str:
        """What a lossy tokenizer called `name` means for a study."""
        unknown = f", {self.unknown / self.tokens:.1%} of its tokens are unknown ones" if self.unknown else ""
        return (
            f"tokenizer {name} loses text: {self.changed:,} of {self.pieces:,} pieces of the corpus do not come back "
            f"from their tokens{unknown}. No model has to predict what is lost, so that val_bpb is too low and "
            "compares with runs of this tokenizer only"
        )


def try_out(
    documents: Sequence[bytes], encode: Callable[[str], list[int]], decode: Callable[[list[int]], str], unknown: object
) -> RoundTrip:
    """PIECES of the documents, evenly spaced, there and back; spaces in front, which some tokenizers add, count not."""
    chosen = [documents[i] for i in sorted({i * len(documents) // PIECES for i in range(PIECES)})] if documents else []
    found = RoundTrip()
    for document in chosen:
        text = document[:PIECE].decode(errors="ignore")  # cut within a character, perhaps
        ids = encode(text)
        is_changed = decode(ids).lstrip(" ") != text.lstrip(" ")
        found += RoundTrip(1, int(is_changed), len(ids), sum(token == unknown for token in ids))
    return found
