"""A packed corpus as batches: pure functions of (corpus, seed, step), so that every trial sees the same ones.

Training windows come without replacement within an epoch, in an order drawn for that epoch, from a stream that is
turned by a random shift so that windows do not always begin at the same tokens. The i-th window of a run is the same
whatever the batch size: row b of step s is window s * batch_size + b.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archsearch.data.packed import PackMeta, read_array
from archsearch.data.shuffle import mix, permute
from archsearch.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Windows of tokens and what follows each token.

    target_bytes: bytes of text that all targets together stand for, the denominator of bits per byte.
    seq_idx: the document that each target belongs to, counted from 0 in every row; the token that ends a document is
    its last target, and as an input it opens the next one. None where documents may see each other.
    """

    inputs: Ints  # [B, T]
    targets: Ints  # [B, T]
    target_bytes: int
    seq_idx: NDArray[np.int32] | None  # [B, T]


def bits_per_byte(nats: float, target_bytes: int) -> float:
    """Bits per byte of text from the summed negative log-likelihood (in nats) of the targets."""
    return nats / (math.log(2) * target_bytes)


class Stream:
    """The tokens of one side of the split, read as a ring: behind the last document comes the first.

    ends [n_documents]: index behind the last token of each document. rest [n_documents]: bytes of a document that the
    table of token bytes does not explain (0 for byte-level tokenizers), booked on its last token.
    """

    def __init__(self, tokens: NDArray[Any], ends: Ints, rest: Ints | None) -> None:
        self.tokens = tokens
        self.ends = ends
        self.rest = rest

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, starts: Ints, length: int) -> Ints:
        """[B, length] tokens from each of `starts` [B] on; length <= len(self)."""
        rows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            head = self.tokens[start : start + length]
            row[: len(head)] = head
            row[len(head) :] = self.tokens[: length - len(head)]
        return rows

    def documents(self, starts: Ints, length: int) -> NDArray[np.int32]:
        """[B, length] numbers of the documents that the tokens which `read` returns belong to, from 0 in each row."""
        numbers = self._ended_at(starts[:, None] + np.arange(length))
        return (numbers - numbers[:, :1]).astype(np.int32)

    def rest_bytes(self, starts: Ints, length: int) -> int:
        """The unexplained bytes booked on the tokens that `read` returns."""
        if self.rest is None:
            return 0
        ended = zip(self._ended_at(starts).tolist(), self._ended_at(starts + length).tolist(), strict=True)
        return sum(int(self.rest[np.arange(first, last) % len(self.ends)].sum()) for first, last in ended)

    def _ended_at(self, position: Ints) -> Ints:
        """How many documents end at or before a position of the ring, unrolled: that is also the number of its own."""
        turns, position = np.divmod(position, len(self))
        return turns * len(self.ends) + np.searchsorted(self.ends, position, side="right")


class Corpus:
    """A packed folder, opened for training. Everything is memory-mapped; nothing is kept between batches."""

    def __init__(self, folder: Path, meta: PackMeta, isolate_documents: bool = False) -> None:
        self.folder = folder
        self.meta = meta
        self.isolate_documents = isolate_documents
        self.token_bytes = read_array(folder / "token_bytes.bin", "<i4")
        self.train = self._stream("train")
        self.val = self._stream("val")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.meta.vocab_size

    @property
    def sha256(self) -> str:
        """Hash of all tokens, document ends and the split."""
        return self.meta.sha256

    @property
    def n_train_tokens(self) -> int:
        """Tokens to train on, ends of documents included."""
        return len(self.train)

    @property
    def n_val_tokens(self) -> int:
        """Held-out tokens."""
        return len(self.val)

    def summary(self) -> str:
        """A few lines for a person: sizes, split, hash, folder."""
        return self.meta.summary(self.folder)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data: meta.json and the folder."""
        return {"folder": str(self.folder), **self.meta.to_json()}

    def train_batch(self, step: int, *, batch_size: int, context: int, seed: int) -> Batch:
        """The batch of one training step. Raises DataError if the training part holds no whole window."""
        self._check_context(self.train, "training part", context)
        n_windows = len(self.train) // context
        index = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
        epoch, index = np.divmod(index, np.uint64(n_windows))
        key = mix(mix(np.full_like(epoch, seed)) ^ epoch)
        shift = mix(~key) % np.uint64(len(self.train))
        starts = (shift + permute(index, n_windows, key) * np.uint64(context)) % np.uint64(len(self.train))
        return self._batch(self.train, starts.astype(np.int64), context)

    def val_batches(self, *, batch_size: int, context: int, max_tokens: int) -> Iterator[Batch]:
        """Held-out windows, always the same: as many as fit in `max_tokens` (at least one), spread evenly over the
        held-out part, not overlapping, each target counted once; the last batch may have fewer rows.

        Raises DataError if the held-out part holds no whole window.
        """
        self._check_context(self.val, "held-out part", context)
        n_windows = len(self.val) // context
        n_chosen = min(n_windows, max(1, max_tokens // context))
        chosen = np.arange(n_chosen, dtype=np.int64) * n_windows // n_chosen
        starts = (chosen * context - 1) % len(self.val)  # the ring's last token ends a document and predicts the first
        return (self._batch(self.val, starts[i : i + batch_size], context) for i in range(0, n_chosen, batch_size))

    def _batch(self, stream: Stream, starts: Ints, context: int) -> Batch:
        tokens = stream.read(starts, context + 1)
        targets = np.ascontiguousarray(tokens[:, 1:])
        behind = (starts + 1) % len(stream)
        return Batch(
            inputs=np.ascontiguousarray(tokens[:, :-1]),
            targets=targets,
            target_bytes=int(self.token_bytes[targets].sum()) + stream.rest_bytes(behind, context),
            seq_idx=stream.documents(behind, context) if self.isolate_documents else None,
        )

    def _stream(self, side: str) -> Stream:
        ends = read_array(self.folder / f"{side}.ends.bin", "<i8")
        rest = None if self.meta.byte_exact else read_array(self.folder / f"{side}.rest.bin", "<i8")
        return Stream(read_array(self.folder / f"{side}.bin", self.meta.dtype), ends, rest)

    def _check_context(self, stream: Stream, part: str, context: int) -> None:
        if len(stream) <= context:
            raise DataError(
                f"the {part} of corpus {self.meta.corpus!r} has {len(stream)} tokens, fewer than one window of "
                f"context {context} and what follows it; use a larger corpus or a smaller context"
            )
