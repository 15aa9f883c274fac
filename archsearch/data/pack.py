"""Open a corpus for training, packed into the cache the first time; later only names, sizes and times are compared."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from archsearch.data.batches import Corpus
from archsearch.data.cache import CORPORA, build_folder, cache_dir, cached_folder
from archsearch.data.corpora import NAMED, Source, find_corpus, located
from archsearch.data.documents import read_documents
from archsearch.data.packed import FORMAT, is_packed, read_meta
from archsearch.data.tokenizers import (
    FILE,
    ByteTokenizer,
    Tokenizer,
    fingerprint_of,
    load_tokenizer,
    read_json,
    tokenizer_of,
    tokenizer_path,
)
from archsearch.data.writer import PACKER_VERSION, digest, held_out_bound, write_packed
from archsearch.errors import DataError

if TYPE_CHECKING:
    from archsearch.settings import Task

SMALL = 8 << 20  # bytes of text that are read and hashed within a tenth of a second


def open_corpus(task: Task, base_dir: Path | None = None, expect_sha256: str | None = None) -> Corpus:
    """The packed corpus of a task, packed first if the cache does not hold it.

    base_dir: where relative paths start (the folder of space.yaml). expect_sha256: the data that the study began with.
    Raises DataError if the corpus cannot be used, or if its hash is not the expected one.
    """
    folder = _packed_folder(task.corpus, task.tokenizer, base_dir)
    corpus = Corpus(folder, read_meta(folder), task.isolate_documents)
    if expect_sha256 is not None and corpus.sha256 != expect_sha256:
        raise DataError(
            f"corpus {task.corpus!r} is not the one this study began with: expected sha256 {expect_sha256}, found "
            f"{corpus.sha256} (Python {platform.python_version()} on {platform.node()}, packed in {folder}). Trials on "
            "different data cannot be compared: copy the packed folder of the first machine here and name it as "
            "task.corpus on both, or start a new run"
        )
    return corpus


def pack(corpus: str, tokenizer: str = "bytes", base_dir: Path | None = None, out: Path | None = None) -> Corpus:
    """Pack into the folder `out` (the cache when None); `task.corpus` may name that folder on any machine.

    A packed corpus that stands in `out` is replaced; any other content there is a DataError.
    """
    if out is None:
        folder = _packed_folder(corpus, tokenizer, base_dir)
        return Corpus(folder, read_meta(folder))
    out = out.absolute()
    if out.exists() and not is_packed(out) and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists and is no packed corpus; name a folder that does not exist yet")
    if _packed_at(corpus, base_dir):
        raise DataError(f"{corpus} is packed already: name it as task.corpus, or copy the folder")
    source = find_corpus(corpus, base_dir)
    fill = partial(write_packed, source, tokenizer_of(source, tokenizer, base_dir))
    try:
        build_folder(out, fill, is_done=lambda _: False)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error
    return Corpus(out, read_meta(out))


def vocab_size(task: Task, base_dir: Path | None = None) -> int:
    """Number of token ids a task has, without packing anything."""
    if task.corpus == "builtin" and task.tokenizer == "bytes":
        return len(ByteTokenizer().token_bytes)
    if folder := _packed_at(task.corpus, base_dir):
        return read_meta(folder).vocab_size
    return len(tokenizer_of(find_corpus(task.corpus, base_dir), task.tokenizer, base_dir).token_bytes)


def holds_tokens(corpus: str, base_dir: Path | None = None) -> bool:
    """Whether a corpus is of token ids, packed or .bin; not so where it is not there or cannot be used."""
    if corpus in NAMED:
        return False
    if _packed_at(corpus, base_dir):
        return True
    if any(_may_be_tokens(item.strip(), base_dir) for item in corpus.split(",")):
        with suppress(DataError):
            return find_corpus(corpus, base_dir).is_tokens
    return False


def _may_be_tokens(item: str, base_dir: Path | None) -> bool:
    """Whether one must look: globs of a million texts are not gone through for this."""
    suffix = Path(item).suffix
    return suffix in ("", ".bin") or glob.has_magic(suffix) or os.path.isdir(located(item, base_dir))


def tokenizer_json(corpus: Corpus, task: Task, base_dir: Path | None = None) -> str | None:
    """The tokenizer.json that a task's corpus was packed with; None for bytes, and where it cannot be had any more.

    Folders packed by older versions hold none; then the task's own is taken if its hash is the one they note.
    """
    named = [] if task.tokenizer == ByteTokenizer.name else [tokenizer_path(task.tokenizer, base_dir)]
    for path in (corpus.folder / FILE, *named):
        with suppress(DataError):
            content = read_json(path)
            if fingerprint_of(content) == corpus.meta.tokenizer_sha256:
                return json.dumps(content)
    return None


def held_out_tokens(task: Task, base_dir: Path | None = None) -> int | None:
    """Number of held-out tokens a task has, without packing anything; None where counting them would take long.

    Raises DataError if the corpus cannot be used.
    """
    if folder := _packed_at(task.corpus, base_dir):
        return read_meta(folder).val.n_tokens
    source = find_corpus(task.corpus, base_dir)
    made = tokenizer_of(source, task.tokenizer, base_dir)
    cached = cache_dir() / CORPORA / _name_of(source, made)
    if _is_whole(cached):
        return read_meta(cached).val.n_tokens
    if source.n_bytes > SMALL or not isinstance(made, ByteTokenizer):
        return None
    documents = list(read_documents(source, made.end_id, []))
    bound = held_out_bound(documents, source.name)
    return sum(len(document) + 1 for document in documents if digest(document) <= bound)


def _packed_at(corpus: str, base_dir: Path | None) -> Path | None:
    """The packed folder that `corpus` names, if it names one."""
    folder = located(corpus, base_dir)
    return folder if corpus not in NAMED and is_packed(folder) else None


def _packed_folder(corpus: str, tokenizer: str, base_dir: Path | None) -> Path:
    if folder := _packed_at(corpus, base_dir):
        meta = read_meta(folder)
        if tokenizer != ByteTokenizer.name:  # the default goes with whatever the folder was packed with
            wanted = load_tokenizer(tokenizer, base_dir)
            if wanted.fingerprint != meta.tokenizer_sha256:
                raise DataError(
                    f"{folder} was packed with tokenizer {meta.tokenizer}, not with {tokenizer}; pack the text again, "
                    "or leave task.tokenizer out"
                )
        return folder
    source = find_corpus(corpus, base_dir)
    made = tokenizer_of(source, tokenizer, base_dir)
    return cached_folder(_name_of(source, made), partial(write_packed, source, made), _is_whole)


def _name_of(source: Source, tokenizer: Tokenizer) -> str:
    """The name of a packed corpus in the cache."""
    parts = f"{PACKER_VERSION} {FORMAT} {source.manifest_sha256} {tokenizer.fingerprint}"
    label = "".join(c if c.isalnum() else "-" for c in Path(source.name).stem)[:24].strip("-") or "corpus"
    return f"{label}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def _is_whole(folder: Path) -> bool:
    try:
        read_meta(folder)
    except DataError:
        return False
    return True
