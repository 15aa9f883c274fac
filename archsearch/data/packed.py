"""What a packed corpus is on disk: a folder of raw little-endian arrays and a meta.json that says what they are.

| file             | holds                                                          |
| ---------------- | -------------------------------------------------------------- |
| meta.json        | `PackMeta`                                                     |
| token_bytes.bin  | int32: bytes of text behind every token id                     |
| SIDE.bin         | uint16 or uint32: the tokens of all documents, one behind the other |
| SIDE.ends.bin    | int64: index behind the last token of each document            |
| SIDE.rest.bin    | int64: bytes of each document that token_bytes does not explain |
| tokenizer.json   | what made the tokens, where that is such a file; older folders have none |

SIDE is train or val.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archsearch.data.fidelity import RoundTrip
from archsearch.errors import DataError

FORMAT = 1
SIDES = ("train", "val")
NAMED_FILES = 3  # of those that were skipped


@dataclass(frozen=True)
class SideMeta:
    """Size of one side of the split; n_bytes counts text."""

    n_tokens: int
    n_bytes: int
    n_documents: int


@dataclass(frozen=True)
class PackMeta:
    """The meta.json of a packed folder.

    sha256: of every array of the folder, so of the tokens, their order and the split.
    manifest: hash of the names, sizes and times of the source files.
    byte_exact: every document's bytes are the sum of its tokens' bytes; the rest files are all zero.
    skipped: the first of the files that hold no text. round_trip: what the tokenizer gave back, where it was tried.
    """

    archsearch_corpus: int
    corpus: str
    sha256: str
    dtype: str
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    train: SideMeta
    val: SideMeta
    byte_exact: bool
    manifest: str
    n_files: int
    n_skipped: int
    licence: str | None
    python: str
    created: str
    skipped: tuple[str, ...] = ()
    round_trip: RoundTrip | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PackMeta:
        """The inverse of `to_json`; raises TypeError or KeyError on other data."""
        given: dict[str, Any] = {side: SideMeta(**data[side]) for side in SIDES}
        given["skipped"] = tuple(data.get("skipped", ()))
        given["round_trip"] = RoundTrip(**data["round_trip"]) if data.get("round_trip") else None
        return cls(**{**data, **given})

    @property
    def loss(self) -> str | None:
        """What to say of a tokenizer that does not give the text back."""
        found = self.round_trip
        return found.text(self.tokenizer) if found is not None and found.is_lossy else None

    @property
    def left_out(self) -> str | None:
        """How many files hold no text, and the first of them."""
        if not self.n_skipped:
            return None
        names = ": " + ", ".join(self.skipped) if self.skipped else ""
        more = ", ..." if names and self.n_skipped > len(self.skipped) else ""
        return f"{self.n_skipped} skipped (not text){names}{more}"

    def file_sizes(self) -> dict[str, int]:
        """The name and size in bytes of every array."""
        sizes = {"token_bytes.bin": 4 * self.vocab_size}
        for name, side in (("train", self.train), ("val", self.val)):
            sizes[f"{name}.bin"] = side.n_tokens * np.dtype(self.dtype).itemsize
            sizes[f"{name}.ends.bin"] = sizes[f"{name}.rest.bin"] = 8 * side.n_documents
        return sizes

    def summary(self, folder: Path) -> str:
        """A few lines for a person."""
        skipped = f", {self.left_out}" if self.left_out else ""
        total = self.train.n_tokens + self.val.n_tokens
        n_bytes = self.train.n_bytes + self.val.n_bytes
        lines = [
            f"{self.corpus}: {n_bytes / 1e6:.2f} MB of text in {self.n_files} files{skipped}",
            f"  tokenizer  {self.tokenizer}, {self.vocab_size} ids, {n_bytes / total:.2f} bytes per token",
        ]
        for name, side in (("train", self.train), ("val", self.val)):
            share = f"{side.n_tokens / total:.1%}"
            lines.append(f"  {name:9}  {side.n_tokens:,} tokens ({share}), {side.n_documents:,} documents")
        lines += [f"  sha256     {self.sha256}", f"  folder     {folder}"]
        return "\n".join([*lines, f"  licence    {self.licence}"] if self.licence else lines)


def is_packed(folder: Path) -> bool:
    """Whether `folder` calls itself a packed corpus; it may still be damaged."""
    try:
        return "archsearch_corpus" in json.loads((folder / "meta.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def read_meta(folder: Path) -> PackMeta:
    """meta.json, once every array has the size it says. Raises DataError on a folder that is damaged or too new."""
    try:
        data = json.loads((folder / "meta.json").read_bytes())
        if data.get("archsearch_corpus") != FORMAT:
            raise DataError(
                f"{folder} was packed in format {data.get('archsearch_corpus')}, expected {FORMAT}; pack again"
            )
        meta = PackMeta.from_json(data)
    except OSError as error:
        raise DataError(f"cannot read {folder / 'meta.json'}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder / 'meta.json'} is damaged ({error!r}); pack the corpus again") from error
    for name, size in meta.file_sizes().items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise DataError(
                f"{path} is damaged: expected {size} bytes, found {'no file' if found is None else found}; pack again"
            )
    return meta


def read_array(path: Path, dtype: str) -> NDArray[Any]:
    """A raw array, memory-mapped and read-only."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # slices of a plain array cost a third of a memmap's
