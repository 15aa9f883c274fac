"""Files to documents: text, .jsonl rows, .parquet rows, or the token ids of a nanoGPT-style .bin.

A document is bytes: UTF-8 text, or raw little-endian uint16 ids. Long ones are cut into pieces, each then a document,
so that a corpus of one file can be split into a training and a held-out part.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from archsearch.data.corpora import Source, SourceFile
from archsearch.errors import DataError, did_you_mean

MAX_PIECE = 64 * 1024
MIN_PIECE = 64
LONG = 16  # documents of more than this many pieces are cut (1 MiB in a large corpus)
SCANNED_TOKENS = 1 << 22


def piece_bytes(n_bytes: int) -> int:
    """Size of a piece in a corpus of `n_bytes`: 64 KiB, and less where a hundred of those would be too many."""
    return min(max(n_bytes // 100, MIN_PIECE), MAX_PIECE)


def read_documents(source: Source, end_id: int | None, skipped: list[Path]) -> Iterator[bytes]:
    """Every document that is not empty, in order; `end_id` separates the documents of a .bin.

    Files found by walking or by a glob that hold no text are left out and added to `skipped`; rows whose text is null
    are left out. Raises DataError on rows that cannot be read and on named files that are not text.
    """
    piece = piece_bytes(source.n_bytes)
    for file in source.files:
        try:
            if source.is_tokens:
                yield from _token_documents(file, piece // 2, end_id)
            elif file.path.suffix == ".jsonl":
                yield from _rows(_jsonl(file), piece)
            elif file.path.suffix == ".parquet":
                yield from _rows(_parquet(file), piece)
            else:
                yield from _text(file, piece, skipped)
        except OSError as error:
            raise DataError(f"cannot read {file.path}: {error.strerror or error}") from error


def _text(file: SourceFile, piece: int, skipped: list[Path]) -> Iterator[bytes]:
    with file.path.open("rb") as stream:
        whole = file.size <= LONG * piece
        for i, document in enumerate([stream.read()] if whole else _pieces(stream, piece)):
            if _is_text(document):
                if document:
                    yield document
                continue
            if file.is_named:
                raise DataError(f"{file.path} is not text: expected UTF-8 without zero bytes")
            skipped.append(file.path)
            if i == 0:
                return


def _is_text(document: bytes) -> bool:
    if b"\0" in document:
        return False
    try:
        document.decode()
    except UnicodeDecodeError:
        return False
    return True


def _rows(rows: Iterator[str], piece: int) -> Iterator[bytes]:
    for row in rows:
        document = row.encode(errors="replace")  # JSON can spell half a surrogate pair, UTF-8 cannot
        if len(document) > LONG * piece:
            yield from _pieces(io.BytesIO(document), piece)
        elif document:
            yield document


def _pieces(stream: BinaryIO, piece: int) -> Iterator[bytes]:
    """Cut behind the first line end after `piece` bytes, or between characters where lines have no end."""
    rest = b""
    while block := stream.read(piece):
        block = rest + block + stream.readline(piece)
        whole = _whole_characters(block)
        yield block[:whole]
        rest = block[whole:]
    if rest:
        yield rest


def _whole_characters(block: bytes) -> int:
    """Bytes of `block` without a last character that is cut in two."""
    for back in range(1, min(3, len(block)) + 1):
        lead = block[-back]
        if lead >= 0xC0:  # first byte of a character of 2, 3 or 4
            length = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            return len(block) if back >= length else len(block) - back
        if lead < 0x80:
            break
    return len(block)


def _jsonl(file: SourceFile) -> Iterator[str]:
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            where = f"{file.path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{where}: found a {type(row).__name__}; expected an object with a field {file.field!r}"
                )
            text = row.get(file.field)
            if isinstance(text, str):
                yield text
            elif text is not None or file.field not in row:
                kind = type(text).__name__ if file.field in row else None
                raise DataError(f"{where}: {_no_field(file, list(row), kind)}")


def _parquet(file: SourceFile) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file.path} needs pyarrow ({error}): pip install 'archsearch[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            kinds = {field.name: field.type for field in table.schema_arrow}
            kind = kinds.get(file.field)
            texts = kind.value_type if kind is not None and pyarrow.types.is_dictionary(kind) else kind
            if texts not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
                raise DataError(f"{file.path}: {_no_field(file, list(kinds), kind and str(kind))}")
            for batch in table.iter_batches(batch_size=1024, columns=[file.field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file.path} is not a parquet file: {error}") from error


def _no_field(file: SourceFile, found: list[str], kind: str | None) -> str:
    """What to say when the field is not there, or holds no text but something of another `kind`."""
    others = [name for name in found if name != file.field]
    what = f"; it is {kind}" if kind else ""
    return (
        f"no text in {file.field!r}{what}; found {', '.join(found) or 'nothing'}.{did_you_mean(file.field, others)} "
        f"Name another one as {file.path.name}#field"
    )


def _token_documents(file: SourceFile, piece: int, end_id: int | None) -> Iterator[bytes]:
    """Runs of ids up to and with `end_id`; `piece` counts tokens."""
    if file.size % 2:
        raise DataError(f"{file.path} has {file.size} bytes; expected uint16 tokens, two bytes each")
    if file.size == 0:
        return
    tokens = np.memmap(file.path, dtype="<u2", mode="r")
    start = 0
    for scanned in range(0, len(tokens), SCANNED_TOKENS):
        block = tokens[scanned : scanned + SCANNED_TOKENS]
        ends = [] if end_id is None else (np.flatnonzero(block == end_id) + scanned + 1).tolist()
        if scanned + len(block) == len(tokens):
            ends.append(len(tokens))
        for end in ends:
            size = piece if end - start > LONG * piece else max(end - start, 1)
            for at in range(start, end, size):
                yield tokens[at : min(at + size, end)].tobytes()
            start = end
