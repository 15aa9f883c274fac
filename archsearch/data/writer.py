"""Write a packed corpus: read, split by content, tokenize.

Held-out documents are those with the lowest sha256, up to 5 % of the bytes: the same whatever their names and order,
and two copies of one document are never on both sides.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from archsearch.data.corpora import Source
from archsearch.data.documents import read_documents
from archsearch.data.fidelity import RoundTrip
from archsearch.data.packed import FORMAT, NAMED_FILES, PackMeta, SideMeta
from archsearch.data.tokenizers import FILE, Ids, Tokenizer
from archsearch.errors import DataError

PACKER_VERSION = 1  # raise it whenever equal sources would give other tokens, documents or sides
HELD_OUT = 0.05
ENCODED_BYTES = 4 << 20  # text that is tokenized at once


def write_packed(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Pack `source` into the empty `folder`. Raises DataError if there is nothing to train on or to hold out."""
    skipped: list[Path] = []
    bound = held_out_bound(read_documents(source, tokenizer.end_id, skipped), source.name)
    vocab_size = len(tokenizer.token_bytes)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    tried = []
    with (folder / "train.bin").open("wb") as train_file, (folder / "val.bin").open("wb") as val_file:
        train, val = _Side(train_file, dtype), _Side(val_file, dtype)
        for documents in _chunks(read_documents(source, tokenizer.end_id, [])):
            tried += [found] if (found := tokenizer.round_trip(documents)) else []
            for document, ids in zip(documents, tokenizer.encode(documents), strict=True):
                explained = int(tokenizer.token_bytes[ids].sum())
                n_bytes = explained if source.is_tokens else len(document)
                (val if digest(document) <= bound else train).add(ids, n_bytes, explained)
    if not source.is_unchanged():
        raise DataError(f"the files of corpus {source.name!r} changed while they were read; try again")
    table = tokenizer.token_bytes.astype("<i4").tobytes()
    (folder / "token_bytes.bin").write_bytes(table)
    if tokenizer.content is not None:
        (folder / FILE).write_text(json.dumps(tokenizer.content))
    train.write_documents(folder, "train")
    val.write_documents(folder, "val")
    meta = PackMeta(
        archsearch_corpus=FORMAT,
        corpus=source.name,
        sha256=hashlib.sha256(b"".join([dtype.encode(), table, train.digest(), val.digest()])).hexdigest(),
        dtype=dtype,
        vocab_size=vocab_size,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.fingerprint,
        train=train.meta(),
        val=val.meta(),
        byte_exact=not any(train.rest) and not any(val.rest),
        manifest=source.manifest_sha256,
        n_files=len(source.files),
        n_skipped=len(set(skipped)),
        licence=source.licence,
        python=platform.python_version(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        skipped=tuple(map(str, dict.fromkeys(skipped)))[:NAMED_FILES],
        round_trip=sum(tried, RoundTrip()) if tried else None,
    )
    (folder / "meta.json").write_text(json.dumps(meta.to_json(), indent=1))
    for path in folder.iterdir():  # the folder is renamed to its place next: its content must be on disk before
        with path.open("rb") as file:
            os.fsync(file.fileno())


def digest(document: bytes) -> int:
    """The first 8 bytes of the sha256, on which the split stands."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big")


def held_out_bound(documents: Iterable[bytes], name: str) -> int:
    """The digest up to which documents are held out: HELD_OUT of all bytes, at least one document and never all."""
    digests, sizes = array("Q"), array("Q")
    for document in documents:
        digests.append(digest(document))
        sizes.append(len(document))
    if not digests:
        raise DataError(f"corpus {name!r} is empty: no file of it holds any text")
    distinct, inverse = np.unique(np.frombuffer(digests, dtype=np.uint64), return_inverse=True)
    if len(distinct) < 2:
        raise DataError(
            f"corpus {name!r} is too small to hold anything out: {sum(sizes)} bytes, one distinct document; "
            "expected two or more different documents, or a few kilobytes of text"
        )
    size = np.bincount(inverse, weights=np.frombuffer(sizes, dtype=np.uint64))
    last = int(np.searchsorted(np.cumsum(size), HELD_OUT * size.sum()))
    return int(distinct[min(last, len(distinct) - 2)])


class _Side:
    """One side of the split while it is written."""

    def __init__(self, file: BinaryIO, dtype: str) -> None:
        self.file = file
        self.dtype = dtype
        self.hash = hashlib.sha256()
        self.ends, self.rest = array("q"), array("q")
        self.n_tokens = self.n_bytes = 0

    def add(self, ids: Ids, n_bytes: int, explained: int) -> None:
        """One document of `n_bytes`, of which the table of token bytes explains some."""
        raw = ids.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.hash.update(raw)
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes
        self.ends.append(self.n_tokens)
        self.rest.append(n_bytes - explained)

    def write_documents(self, folder: Path, name: str) -> None:
        """The files beside the tokens."""
        for kind, values in (("ends", self.ends), ("rest", self.rest)):
            (folder / f"{name}.{kind}.bin").write_bytes(_int64(values))

    def digest(self) -> bytes:
        """Hash of tokens and documents."""
        return hashlib.sha256(self.hash.digest() + _int64(self.ends) + _int64(self.rest)).digest()

    def meta(self) -> SideMeta:
        """Sizes."""
        return SideMeta(self.n_tokens, self.n_bytes, len(self.ends))


def _int64(values: array[int]) -> bytes:
    return np.frombuffer(values, dtype=np.int64).astype("<i8").tobytes()


def _chunks(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lists of documents of about ENCODED_BYTES."""
    chunk: list[bytes] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= ENCODED_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
