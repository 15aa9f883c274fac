"""Packing: the split by content, the cache and what happens to it, packed folders, and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from archsearch.choosers import RandomChooser
from archsearch.data import Corpus, open_corpus, pack, tokenizer_json, vocab_size
from archsearch.data.cache import build_folder, cache_dir
from archsearch.data.packed import read_meta
from archsearch.data.writer import digest, held_out_bound
from archsearch.errors import DataError
from archsearch.settings import Task
from archsearch.space import SearchSpace


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 200 small files, each different."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i:03}.txt").write_text(f"document {i}\n" * (5 + i % 7))
    return folder


def stored_documents(corpus: Corpus, side: str) -> list[bytes]:
    """The documents of a side, read back from a corpus of bytes without their ends."""
    stream = getattr(corpus, side)
    starts = [0, *stream.ends[:-1].tolist()]
    return [bytes(stream.tokens[a : b - 1].tolist()) for a, b in zip(starts, stream.ends.tolist(), strict=True)]


def test_every_document_is_on_the_side_its_content_says(texts):
    corpus = pack(str(texts))
    sides = {side: stored_documents(corpus, side) for side in ("train", "val")}
    everything = sorted(path.read_bytes() for path in texts.iterdir())
    assert sorted(sides["train"] + sides["val"]) == everything
    ranks = {side: [hashlib.sha256(document).hexdigest() for document in sides[side]] for side in sides}
    assert max(ranks["val"]) < min(ranks["train"])
    held_out = sum(map(len, sides["val"]))
    assert 0.05 <= held_out / sum(map(len, everything)) < 0.06
    for side, meta in (("train", corpus.meta.train), ("val", corpus.meta.val)):
        assert meta.n_bytes == sum(map(len, sides[side]))
        assert meta.n_documents == len(sides[side])
        assert meta.n_tokens == meta.n_bytes + meta.n_documents
    assert (corpus.n_train_tokens, corpus.n_val_tokens) == (corpus.meta.train.n_tokens, corpus.meta.val.n_tokens)


def test_names_and_order_move_no_document_and_copies_stay_together(texts, tmp_path):
    before = set(stored_documents(pack(str(texts)), "val"))
    other = tmp_path / "other"
    other.mkdir()
    for i, path in enumerate(sorted(texts.iterdir())):
        for copy in range(2):
            (other / f"{999 - i}-{copy}.txt").write_bytes(path.read_bytes())
    corpus = pack(str(other))
    held_out = stored_documents(corpus, "val")
    assert set(held_out) == before
    assert len(held_out) == 2 * len(before)
    assert not set(held_out) & set(stored_documents(corpus, "train"))


def test_one_file_is_split_into_pieces(tmp_path):
    text = "".join(f"this is line {i}\n" for i in range(5000))
    (tmp_path / "one.txt").write_text(text)
    corpus = open_corpus(Task(corpus="one.txt"), tmp_path)
    share = corpus.meta.val.n_bytes / (corpus.meta.val.n_bytes + corpus.meta.train.n_bytes)
    assert 0.05 <= share < 0.08
    assert corpus.meta.val.n_bytes + corpus.meta.train.n_bytes == len(text)


def test_same_split_for_every_tokenizer(texts):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [path.read_text() for path in texts.iterdir()],
        tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.save(str(texts.parent / "bpe.json"))
    as_bytes, as_tokens = pack(str(texts)), pack(str(texts), "bpe.json", texts.parent)
    assert as_tokens.meta.val.n_bytes == as_bytes.meta.val.n_bytes
    assert as_tokens.meta.val.n_documents == as_bytes.meta.val.n_documents
    assert as_tokens.n_val_tokens < 0.7 * as_bytes.n_val_tokens
    assert as_tokens.meta.byte_exact
    assert as_tokens.vocab_size == 301
    assert as_tokens.sha256 != as_bytes.sha256
    assert vocab_size(Task(corpus=str(texts), tokenizer="bpe.json"), texts.parent) == 301


def test_second_opening_reads_no_source(texts, monkeypatch):
    first = open_corpus(Task(corpus=str(texts)))

    def refuse(*_: object) -> None:
        raise AssertionError("sources were read again")

    monkeypatch.setattr("archsearch.data.writer.read_documents", refuse)
    second = open_corpus(Task(corpus=str(texts)))
    assert second.folder == first.folder
    assert second.sha256 == first.sha256
    (texts / "000.txt").write_text("something else")
    with pytest.raises(AssertionError, match="read again"):
        open_corpus(Task(corpus=str(texts)))


def test_hash_follows_the_content(texts, tmp_path):
    one = pack(str(texts), out=tmp_path / "one")
    for path in texts.iterdir():
        os.utime(path, (1, 1))
    assert pack(str(texts), out=tmp_path / "two").sha256 == one.sha256
    (texts / "000.txt").write_text("something else")
    assert pack(str(texts), out=tmp_path / "three").sha256 != one.sha256


def test_a_worker_with_other_data_refuses(texts):
    task = Task(corpus=str(texts))
    sha256 = open_corpus(task).sha256
    assert open_corpus(task, expect_sha256=sha256).sha256 == sha256
    with pytest.raises(DataError, match=rf"expected sha256 abc, found {sha256}.*copy the packed folder"):
        open_corpus(task, expect_sha256="abc")


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta", "keys"])
def test_a_damaged_cache_is_packed_again(texts, damage):
    good = open_corpus(Task(corpus=str(texts)))
    content = (good.folder / "train.bin").read_bytes()
    if damage == "truncate":
        (good.folder / "train.bin").write_bytes(content[:-2])
    elif damage == "remove":
        (good.folder / "val.ends.bin").unlink()
    elif damage == "meta":
        (good.folder / "meta.json").write_text('{"archsearch_corpus": 1,')
    else:
        (good.folder / "meta.json").write_text('{"archsearch_corpus": 1, "train": 3, "val": 4}')
    again = open_corpus(Task(corpus=str(texts)))
    assert again.sha256 == good.sha256
    assert (again.folder / "train.bin").read_bytes() == content


def test_a_damaged_packed_folder_is_an_error(texts, tmp_path):
    pack(str(texts), out=tmp_path / "packed")
    with (tmp_path / "packed" / "train.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"train\.bin is damaged: expected \d+ bytes, found 100; pack again"):
        open_corpus(Task(corpus="packed"), tmp_path)
    meta = tmp_path / "packed" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "archsearch_corpus": 99}))
    with pytest.raises(DataError, match="packed in format 99, expected 1; pack again"):
        open_corpus(Task(corpus="packed"), tmp_path)


def test_packed_folder_is_a_corpus_anywhere(texts, tmp_path, cache):
    made = pack(str(texts), out=tmp_path / "packed")
    assert not cache.exists()
    (tmp_path / "packed").rename(tmp_path / "moved")
    for path in texts.iterdir():
        path.unlink()
    corpus = open_corpus(Task(corpus="moved"), tmp_path, expect_sha256=made.sha256)
    assert corpus.folder == tmp_path / "moved"
    assert corpus.n_train_tokens == made.n_train_tokens
    assert vocab_size(Task(corpus="moved"), tmp_path) == 257


def test_packed_folder_keeps_its_tokenizer(texts, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for name, text in (("a.json", "a b"), ("b.json", "c d")):
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator([text], trainer)
        made.save(str(tmp_path / name))
    pack("texts", "a.json", tmp_path, tmp_path / "packed")
    assert open_corpus(Task(corpus="packed", tokenizer="a.json"), tmp_path).meta.tokenizer == "a.json"
    assert open_corpus(Task(corpus="packed"), tmp_path).meta.tokenizer == "a.json"
    with pytest.raises(DataError, match=r"was packed with tokenizer a\.json, not with b\.json"):
        open_corpus(Task(corpus="packed", tokenizer="b.json"), tmp_path)

    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").rename(tmp_path / "moved.json")

    def kept(tokenizer: str = "bytes") -> dict[str, object] | None:
        task = Task(corpus="packed", tokenizer=tokenizer)
        found = tokenizer_json(open_corpus(task, tmp_path), task, tmp_path)
        return None if found is None else json.loads(found)

    assert kept() == kept("moved.json") == content
    (tmp_path / "packed" / "tokenizer.json").write_text((tmp_path / "b.json").read_text())
    assert kept() is None, "another tokenizer's hash is another"
    (tmp_path / "packed" / "tokenizer.json").unlink()  # as older versions packed
    assert kept() is None
    assert kept("moved.json") == content
    plain = open_corpus(Task(corpus="texts"), tmp_path)
    assert tokenizer_json(plain, Task(corpus="texts"), tmp_path) is None
    assert not (plain.folder / "tokenizer.json").exists()


def test_out_replaces_a_packed_corpus_and_nothing_else(texts, tmp_path):
    out = tmp_path / "packed"
    first = pack(str(texts), out=out)
    (texts / "000.txt").write_text("something else")
    assert pack(str(texts), out=out).sha256 != first.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "texts"], "nothing is left beside it"
    with pytest.raises(DataError, match="exists and is no packed corpus"):
        pack(str(texts), out=texts)
    with pytest.raises(DataError, match=r"packed is packed already: name it as task\.corpus"):
        pack("packed", base_dir=tmp_path, out=tmp_path / "again")
    with pytest.raises(DataError, match=r"'packed' is packed already; it can only be named alone"):
        pack("packed, texts", base_dir=tmp_path)
    assert pack("packed", base_dir=tmp_path).folder == out
    (tmp_path / "empty").mkdir()
    assert pack(str(texts), out=tmp_path / "empty").meta.n_files == 200


def test_token_files(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, 4000).astype("<u2")
    ids.tofile(tmp_path / "t.bin")
    counts = [3, 1, 4, 1, 5, 9, 2, 6, 0]
    (tmp_path / "t.bin.json").write_text(json.dumps({"token_bytes": counts, "end_of_document": 8}))
    corpus = open_corpus(Task(corpus="t.bin"), tmp_path)
    assert corpus.vocab_size == 9
    assert corpus.n_train_tokens + corpus.n_val_tokens == 4000
    assert corpus.meta.train.n_bytes + corpus.meta.val.n_bytes == np.array(counts)[ids].sum()
    stored = np.concatenate([corpus.train.tokens, corpus.val.tokens])
    assert np.bincount(stored).tolist() == np.bincount(ids).tolist()
    assert (corpus.val.tokens[corpus.val.ends - 1] == 8).all()


SPACE = """
archsearch: 1
name: small
task: {corpus: "CORPUS"}
scales: {proxy: {n_blocks: 2, d_model: 32, context: 32}}
mixers: {full: {kind: attention, head_dim: 16}}
ffns: {dense: {kind: swiglu}}
layout: {mixer: full, ffn: dense}
"""


def vocabulary(corpus: str, base_dir: Path) -> int:
    """Of the model that a space of this corpus builds."""
    space = SearchSpace.from_text(SPACE.replace("CORPUS", corpus), base_dir=base_dir)
    return space.sample(RandomChooser(0)).architecture.at("proxy").vocab_size


def test_a_model_has_the_vocabulary_of_the_tokens_that_its_corpus_is(tmp_path, texts, monkeypatch):
    np.arange(4000, dtype="<u2").clip(0, 299).tofile(tmp_path / "t.bin")
    (tmp_path / "t.bin.json").write_text(json.dumps({"token_bytes": [1] * 300, "end_of_document": None}))
    pack("t.bin", base_dir=tmp_path, out=tmp_path / "packed")
    (tmp_path / "tokens").mkdir()
    for name in ("t.bin", "t.bin.json"):
        (tmp_path / "tokens" / name).write_bytes((tmp_path / name).read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    for corpus in ("t.bin", "*.bin", "tokens/*.b[i]n", "t.bin, tokens/t.bin", "packed", "~/packed", "~/t.bin"):
        assert vocabulary(corpus, tmp_path) == 300, corpus
    for corpus in ("texts", "texts/*.txt", "nowhere.txt", "builtin", "texts, t.bin"):
        assert vocabulary(corpus, tmp_path) == 257, corpus
    monkeypatch.setattr(sys.modules["archsearch.data.pack"], "find_corpus", None)
    assert vocabulary("texts/**/*.txt, rows.jsonl#body", tmp_path) == 257, "names tell that this is text"


def test_vocabularies_above_uint16(tmp_path, texts):
    pytest.importorskip("tokenizers")
    size = 70_000
    vocabulary = {f"w{i}": i for i in range(size)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }
    (tmp_path / "words.json").write_text(json.dumps(content))
    (tmp_path / "w.jsonl").write_text("\n".join(json.dumps({"text": f"w{size - i} w{i}"}) for i in range(1, 100)))
    corpus = open_corpus(Task(corpus="w.jsonl", tokenizer="words.json"), tmp_path)
    assert corpus.meta.dtype == "<u4"
    assert corpus.vocab_size == size + 1
    assert corpus.train.tokens.max() == size
    assert not corpus.meta.byte_exact, "spaces between words belong to no token"
    assert "words.json loses text: 64 of 64 pieces" in corpus.meta.loss
    assert read_meta(corpus.folder) == corpus.meta
    assert pack(str(texts)).meta.loss is None


def test_two_processes_pack_at_once(texts, cache):
    code = (
        "import sys; from archsearch.data import open_corpus; from archsearch.settings import Task;"
        "print('ready', flush=True); sys.stdin.readline();"
        "print(open_corpus(Task(corpus=sys.argv[1])).sha256)"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(texts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    hashes = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0]
    assert hashes == {open_corpus(Task(corpus=str(texts))).sha256}
    folders = [path for path in cache.iterdir() if path.is_dir()]
    assert len(folders) == 1, "one whole folder and no half ones"
    read_meta(folders[0])


def test_the_first_to_finish_wins_without_locks(tmp_path):
    folder = tmp_path / "folder"

    def is_done(path: Path) -> bool:
        return (path / "done").exists()

    def late(made: Path) -> None:
        (made / "late").touch()
        build_folder(folder, lambda other: (other / "done").touch(), is_done)

    build_folder(folder, late, is_done)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "done"]


def test_what_a_killed_packer_left_is_swept_away(texts, cache):
    folder = open_corpus(Task(corpus=str(texts))).folder
    left = folder.with_name(f"{folder.name}.tmp-killed")
    left.mkdir()
    (folder / "val.bin").unlink()
    open_corpus(Task(corpus=str(texts)))
    assert not left.exists()


def test_a_failed_packing_leaves_nothing(tmp_path, cache):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"txt": ""}')
    with pytest.raises(DataError, match="no text in 'text'"):
        open_corpus(Task(corpus="rows.jsonl"), tmp_path)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_sources_that_change_meanwhile_are_refused(texts, monkeypatch):
    from archsearch.data import writer

    bound = writer.held_out_bound

    def and_then_change(*arguments: object) -> int:
        found = bound(*arguments)
        (texts / "199.txt").write_text("changed")
        return found

    monkeypatch.setattr(writer, "held_out_bound", and_then_change)
    with pytest.raises(DataError, match="changed while they were read"):
        open_corpus(Task(corpus=str(texts)))


def test_something_is_always_left_to_train_on():
    small = next(text for text in (b"%d" % i for i in range(1000)) if digest(text) < digest(b"large" * 100))
    assert held_out_bound([b"large" * 100, small], "two") == digest(small)


def test_too_little_text(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"corpus 'empty\.txt' is empty"):
        open_corpus(Task(corpus="empty.txt"), tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match=r"corpus 'short\.txt' is too small to hold anything out: 9 bytes"):
        open_corpus(Task(corpus="short.txt"), tmp_path)
    (tmp_path / "copy.txt").write_text("too short")
    with pytest.raises(DataError, match="one distinct document"):
        open_corpus(Task(corpus="short.txt, copy.txt"), tmp_path)


def test_a_cache_that_cannot_be_written(texts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write the cache .*point ARCHSEARCH_CACHE at"):
        open_corpus(Task(corpus=str(texts)))


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ARCHSEARCH_CACHE", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("ARCHSEARCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "archsearch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "archsearch"


def test_summary(texts):
    corpus = pack(str(texts))
    lines = corpus.summary().splitlines()
    assert lines[0].endswith("MB of text in 200 files")
    assert "tokenizer  bytes, 257 ids" in lines[1]
    assert lines[2].split()[0] == "train"
    assert lines[3].split()[0] == "val"
    told = json.loads(json.dumps(corpus.to_json()))
    assert told["folder"] == str(corpus.folder)
    assert told["val"]["n_tokens"] == corpus.n_val_tokens


def test_skipped_files_are_named(texts):
    assert pack(str(texts)).meta.left_out is None
    for i in range(5):
        (texts / f"latin{i}.txt").write_bytes("déjà".encode("latin-1"))
    corpus = pack(str(texts))
    first = ", ".join(str(texts / f"latin{i}.txt") for i in range(3))
    assert corpus.meta.left_out == f"5 skipped (not text): {first}, ..."
    assert f"205 files, 5 skipped (not text): {first}, ..." in corpus.summary()
    assert read_meta(corpus.folder) == corpus.meta


def test_folders_of_older_versions_open(texts, tmp_path):
    made = pack(str(texts), out=tmp_path / "packed")
    path = tmp_path / "packed" / "meta.json"
    content = json.loads(path.read_text())
    del content["skipped"], content["round_trip"]
    path.write_text(json.dumps({**content, "n_skipped": 2}))
    meta = open_corpus(Task(corpus="packed"), tmp_path, expect_sha256=made.sha256).meta
    assert (meta.loss, meta.left_out) == (None, "2 skipped (not text)")


def test_builtin(tmp_path):
    corpus = open_corpus(Task())
    assert corpus.meta.licence.startswith("PSF-2.0")
    assert corpus.n_train_tokens > 8_000_000
    assert corpus.n_val_tokens > 262_144, "the default val_tokens are there"
    assert "licence    PSF-2.0" in corpus.summary()


@pytest.mark.parametrize(("module", "is_loaded"), [("numpy", True), ("torch", False), ("tokenizers", False)])
def test_importing_loads_no_torch(module, is_loaded):
    code = f"import archsearch.data, sys; print({module!r} in sys.modules, 'pyarrow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(is_loaded), "False"]
