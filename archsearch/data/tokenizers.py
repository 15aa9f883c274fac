"""Text to token ids, and the bytes of text behind every id, so that bits per byte compare across tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from archsearch.data.corpora import Source, located, missing
from archsearch.data.fidelity import RoundTrip, try_out
from archsearch.errors import DataError

Ids = NDArray[np.unsignedinteger[Any]]

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")  # end of document, first wins
FILE = "tokenizer.json"
META_SPACE = "▁"  # how SentencePiece vocabularies write a space


class Tokenizer(Protocol):
    """Document bytes to ids.

    `token_bytes` [vocab_size]: bytes of text an id stands for, 0 for special ones. `encode` closes every document with
    `end_id`. `fingerprint` changes whenever ids would.
    """

    name: str
    fingerprint: str
    token_bytes: NDArray[np.int32]

    @property
    def content(self) -> dict[str, Any] | None:
        """The tokenizer.json, where there is one."""

    @property
    def end_id(self) -> int | None:
        """The id that ends documents; None: nothing does."""

    def encode(self, documents: Sequence[bytes]) -> list[Ids]:
        """The ids of each document."""

    def round_trip(self, documents: Sequence[bytes]) -> RoundTrip | None:
        """What comes back of some of the documents; None where nothing can be lost here."""


class ByteTokenizer:
    """256 bytes and id 256 for the end of a document.

    257 ids and no padding to a rounder number: a padded head spends parameters on ids that never come, and whoever
    wants the shape of a larger vocabulary writes it as `vocab_size` of a scale.
    """

    name = "bytes"
    fingerprint = "bytes"
    end_id = 256
    content = None

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0], dtype=np.int32)

    def encode(self, documents: Sequence[bytes]) -> list[Ids]:
        return [np.append(np.frombuffer(d, np.uint8).astype(np.uint16), np.uint16(self.end_id)) for d in documents]

    def round_trip(self, documents: Sequence[bytes]) -> None:
        return None


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`, without the special tokens its template would add.

    Documents end with the vocabulary's own end token, or with one more id where it has none of `ENDS`.
    """

    def __init__(self, path: Path) -> None:
        self.content = content = read_json(path)
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"tokenizer {path} needs a package ({error}): pip install 'archsearch[tokenizers]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_deterministic(content)))
        except Exception as error:  # the library raises bare Exception for every mistake in the file
            raise DataError(f"{path} is not a tokenizer.json: {error}") from error
        self.name = path.name if path.name != FILE else f"{path.parent.name}/{path.name}"
        self.fingerprint = fingerprint_of(content)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        self.end_id = next((vocabulary[end] for end in ENDS if end in vocabulary), size)
        self.token_bytes = np.zeros(max(size, self.end_id + 1), dtype=np.int32)
        for token, count in _bytes_by_token(content, vocabulary).items():
            self.token_bytes[vocabulary[token]] = count
        self.token_bytes[self.end_id] = 0

    def encode(self, documents: Sequence[bytes]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast([d.decode() for d in documents], add_special_tokens=False)
        return [np.array([*encoding.ids, self.end_id], dtype=np.uint32) for encoding in encodings]

    def round_trip(self, documents: Sequence[bytes]) -> RoundTrip:
        def encode(text: str) -> list[int]:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids

        return try_out(documents, encode, self._decode, _unknown_id(self.content))

    def _decode(self, ids: list[int]) -> str:
        """The text of ids; where the file has no decoder, its tokens one behind the other."""
        if self._tokenizer.decoder is not None:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
            return text
        joined = "".join(self._tokenizer.id_to_token(token) or "" for token in ids)
        if "ByteLevel" not in _types(self.content.get("pre_tokenizer")):
            return joined.replace(META_SPACE, " ")
        from tokenizers.decoders import ByteLevel

        return ByteLevel().decode([joined])


class TokenFile:
    """The reader of .bin files: ids are already there, their bytes come from a tokenizer.json or a sidecar file."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        token_bytes: NDArray[np.int32],
        end_id: int | None,
        content: dict[str, Any] | None = None,
    ) -> None:
        if len(token_bytes) > 1 << 16:
            raise DataError(
                f"tokenizer {name} has {len(token_bytes)} ids; a .bin of uint16 tokens cannot hold more than 65536. "
                "Pack the text itself"
            )
        self.name = name
        self.fingerprint = fingerprint
        self.token_bytes = token_bytes
        self.end_id = end_id
        self.content = content

    def encode(self, documents: Sequence[bytes]) -> list[Ids]:
        ids: list[Ids] = [np.frombuffer(document, dtype="<u2") for document in documents]
        highest = max(int(document.max()) for document in ids)
        if highest >= len(self.token_bytes):
            raise DataError(
                f"the .bin holds token {highest} but {self.name} ends at {len(self.token_bytes) - 1}: it was written "
                "with another tokenizer, or begins with a header (expected bare uint16 tokens)"
            )
        return ids

    def round_trip(self, documents: Sequence[bytes]) -> None:
        return None


def load_tokenizer(name: str, base_dir: Path | None = None) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json (or of its folder), relative to `base_dir`. Raises DataError."""
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    path = tokenizer_path(name, base_dir)
    if not path.exists():
        raise missing(f"tokenizer {name!r} not found; expected bytes or the path of a tokenizer.json", path, ["bytes"])
    return JsonTokenizer(path)


def tokenizer_path(name: str, base_dir: Path | None = None) -> Path:
    """The file that `name`, a tokenizer.json or its folder, means; it need not be there."""
    path = located(name, base_dir)
    return path / FILE if path.is_dir() else path


def fingerprint_of(content: dict[str, Any]) -> str:
    """The hash by which a tokenizer.json is known, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokenizer_of(source: Source, name: str, base_dir: Path | None = None) -> Tokenizer:
    """The tokenizer that `source` is packed with; for .bin files the one that says what their ids stand for."""
    if not source.is_tokens:
        return load_tokenizer(name, base_dir)
    if name != ByteTokenizer.name:
        made = load_tokenizer(name, base_dir)
        return TokenFile(made.name, made.fingerprint, made.token_bytes, made.end_id, made.content)
    first = source.files[0].path
    sidecar = first.with_name(first.name + ".json")
    if not sidecar.exists():
        raise DataError(
            f"{first} holds token ids, and bits per byte needs the bytes of text behind each: write the tokenizer.json "
            f"they were made with as task.tokenizer, or put {sidecar.name} beside the file: "
            '{"token_bytes": [one number per id], "end_of_document": id or null}'
        )
    content = read_json(sidecar)
    counts, end_id = content.get("token_bytes"), content.get("end_of_document")
    if not isinstance(counts, list) or not counts or not all(type(n) is int and 0 <= n < 1 << 31 for n in counts):
        raise DataError(f"{sidecar}: 'token_bytes' must be a list of whole numbers, one per token id")
    if end_id is not None and not (type(end_id) is int and 0 <= end_id < len(counts)):
        raise DataError(f"{sidecar}: 'end_of_document' is {end_id!r}; expected null or an id below {len(counts)}")
    fingerprint = hashlib.sha256(json.dumps([counts, end_id]).encode()).hexdigest()
    return TokenFile(sidecar.name, fingerprint, np.array(counts, dtype=np.int32), end_id)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises DataError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: found a {type(content).__name__}; expected an object")
    return content


def _deterministic(content: dict[str, Any]) -> dict[str, Any]:
    """Without what would cut, pad or vary the ids of a document."""
    model = content.get("model")
    model = {**model, "dropout": None} if isinstance(model, dict) and "dropout" in model else model
    return {**content, "truncation": None, "padding": None, "model": model}


def _unknown_id(content: dict[str, Any]) -> int | None:
    """The id of what the vocabulary does not hold, if it has one."""
    model = content["model"]
    if "unk_id" in model:  # Unigram
        return model["unk_id"] if isinstance(model["unk_id"], int) else None
    known = model["vocab"] if isinstance(model.get("vocab"), dict) else {}
    found = known.get(model.get("unk_token"))
    return found if isinstance(found, int) else None


def _bytes_by_token(content: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, int]:
    """Bytes of every token: exact for byte-level vocabularies, for others the text one sees; packing books the rest."""
    added = {token["content"]: token["special"] for token in content.get("added_tokens") or ()}
    kinds = {*_types(content.get("pre_tokenizer")), *_types(content.get("decoder"))}
    model = content["model"]
    counts = {}
    for token in vocabulary:
        if token in added:
            counts[token] = 0 if added[token] else len(token.encode())
        elif "ByteLevel" in kinds:
            counts[token] = len(token)  # one character of its alphabet is one byte
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            counts[token] = 1
        else:
            text = token.removeprefix(model.get("continuing_subword_prefix") or "")
            suffix = model.get("end_of_word_suffix") or ""
            text = text.removesuffix(suffix) + " " if suffix and text.endswith(suffix) else text
            counts[token] = len(text.replace(META_SPACE, " ").encode())
    return counts


def _types(node: object) -> Iterator[str]:
    """Every `type` in a tree of pre-tokenizers or decoders."""
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node["type"]
        for value in node.values():
            yield from _types(value)
    elif isinstance(node, list):
        for value in node:
            yield from _types(value)
