"""Batches: the same for every trial, each token once, documents apart, and bytes against direct counts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from archsearch.data import Batch, Corpus, bits_per_byte, open_corpus, pack
from archsearch.data.batches import Stream
from archsearch.data.shuffle import permute
from archsearch.errors import DataError
from archsearch.settings import Task


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 300 files of 1 to 60 bytes, many of them not ASCII."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(300):
        letters = rng.choice(list("abcdefgh ij\nklé你🙂"), size=rng.integers(1, 30))
        (folder / f"{i:03}.txt").write_bytes("".join(letters).encode())
    return folder


@pytest.fixture
def corpus(texts: Path) -> Corpus:
    return pack(str(texts))


def windows(corpus: Corpus, n: int, *, batch_size: int, context: int, seed: int = 0) -> np.ndarray:
    """The first n training windows [n, context], by batches of `batch_size`."""
    steps = range(math.ceil(n / batch_size))
    batches = [corpus.train_batch(s, batch_size=batch_size, context=context, seed=seed) for s in steps]
    return np.concatenate([batch.inputs for batch in batches])[:n]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(n):
    index = np.arange(n, dtype=np.uint64)
    landed = [permute(index, n, np.full_like(index, key)) for key in (0, 1)]
    for found in landed:
        assert sorted(found.tolist()) == list(range(n))
    if n >= 10:
        assert landed[0].tolist() != landed[1].tolist()


def test_permute_has_no_preferred_place():
    keys = np.arange(20_000, dtype=np.uint64)
    landed = np.stack([permute(np.full_like(keys, i), 12, keys) for i in range(12)])  # [12, keys]
    share = np.stack([np.bincount(row.astype(np.int64), minlength=12) for row in landed]) / len(keys)
    assert np.abs(share - 1 / 12).max() < 0.01  # five standard deviations


def test_shapes_and_types(corpus):
    batch = corpus.train_batch(3, batch_size=5, context=16, seed=0)
    assert batch.inputs.shape == batch.targets.shape == (5, 16)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.inputs.flags.c_contiguous
    assert batch.targets.flags.c_contiguous
    assert batch.seq_idx is None
    assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
    assert isinstance(batch.target_bytes, int)


def test_same_batches_for_every_trial(corpus, texts):
    again = open_corpus(Task(corpus=str(texts)))
    for step in (0, 1, 50, 10**9):
        one = corpus.train_batch(step, batch_size=4, context=32, seed=7)
        two = again.train_batch(step, batch_size=4, context=32, seed=7)
        assert (one.inputs == two.inputs).all()
        assert (one.targets == two.targets).all()
        assert one.target_bytes == two.target_bytes
    other = corpus.train_batch(0, batch_size=4, context=32, seed=8)
    assert (other.inputs != corpus.train_batch(0, batch_size=4, context=32, seed=7).inputs).any()


@pytest.mark.parametrize("batch_size", [2, 3, 8, 50])
def test_batch_size_moves_no_window(corpus, batch_size):
    n = 3 * (len(corpus.train) // 32)  # more than two epochs
    one = windows(corpus, n, batch_size=1, context=32)
    assert (windows(corpus, n, batch_size=batch_size, context=32) == one).all()


def test_an_epoch_shows_every_token_once(corpus):
    numbered = Stream(np.arange(len(corpus.train), dtype=np.uint16), corpus.train.ends, None)
    corpus.train, corpus.token_bytes = numbered, np.ones(len(numbered), np.int32)
    n = len(numbered) // 32
    seen = windows(corpus, 4 * n, batch_size=8, context=32).reshape(4, n, 32)
    assert (np.diff(seen, axis=-1) % len(numbered) == 1).all(), "windows are runs of the ring"
    for epoch in seen:
        assert len(np.unique(epoch)) == n * 32
    cuts = {tuple(sorted(epoch[:, 0].tolist())) for epoch in seen}
    assert len(cuts) == 4, "every epoch cuts the stream at other places"
    orders = {tuple(((epoch[:, 0] - epoch[0, 0]) % len(numbered)).tolist()) for epoch in seen}
    assert len(orders) == 4, "every epoch has an order of its own, wherever it starts"


def test_validation_counts_every_target_once(corpus):
    batches = list(corpus.val_batches(batch_size=3, context=8, max_tokens=10**9))
    n_windows = len(corpus.val) // 8
    assert [len(batch.inputs) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    targets = np.concatenate([batch.targets for batch in batches])
    assert targets.shape == (n_windows, 8)
    assert targets.ravel().tolist() == corpus.val.tokens[: n_windows * 8].tolist()
    inputs = np.concatenate([batch.inputs for batch in batches]).ravel()
    assert inputs[0] == 256, "the first token is predicted from an end of document"
    assert inputs[1:].tolist() == corpus.val.tokens[: n_windows * 8 - 1].tolist()


def test_validation_budget_is_spread_and_fixed(corpus):
    corpus.val = Stream(np.arange(8 * 100 + 3, dtype=np.uint16) % 257, corpus.val.ends, None)
    found = list(corpus.val_batches(batch_size=4, context=8, max_tokens=10 * 8 + 7))
    firsts = [first for batch in found for first in batch.targets[:, 0].tolist()]
    assert firsts == [start % 257 for start in range(0, 800, 80)]
    (least,) = corpus.val_batches(batch_size=4, context=8, max_tokens=1)
    assert least.targets.shape == (1, 8)


def direct_bytes(batch: Batch) -> int:
    """Bytes of all targets of a corpus of bytes."""
    return sum(1 for token in batch.targets.ravel().tolist() if token < 256)


def test_target_bytes_of_bytes(corpus):
    for step in range(20):
        batch = corpus.train_batch(step, batch_size=4, context=32, seed=0)
        assert batch.target_bytes == direct_bytes(batch)
    batches = list(corpus.val_batches(batch_size=2, context=1, max_tokens=10**9))
    assert sum(batch.target_bytes for batch in batches) == corpus.meta.val.n_bytes


@pytest.mark.parametrize("prefix_space", [False, True], ids=["exact", "prefix_space"])
def test_target_bytes_of_a_tokenizer(texts, prefix_space):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([path.read_text() for path in texts.iterdir()], trainer)
    bpe.save(str(texts.parent / "bpe.json"))
    corpus = pack(str(texts), "bpe.json", texts.parent)
    assert corpus.meta.byte_exact is not prefix_space

    held_out = sum(batch.target_bytes for batch in corpus.val_batches(batch_size=4, context=1, max_tokens=10**9))
    as_bytes = pack(str(texts))
    assert held_out == as_bytes.meta.val.n_bytes == corpus.meta.val.n_bytes

    # 40 windows of the ring, 3 of them over its end, against the documents themselves
    documents = [path.read_text() for path in sorted(texts.iterdir())]
    end = corpus.vocab_size - 1
    size: list[int] = []  # bytes booked on every token of the stream
    for document in documents:
        ids = bpe.encode(document).ids
        if list(corpus.train.tokens[len(size) : len(size) + len(ids) + 1]) != [*ids, end]:
            continue  # held out
        counts = [len(bpe.id_to_token(i)) for i in ids]
        size += [*counts, len(document.encode()) - sum(counts)]
    assert len(size) == len(corpus.train)
    starts = np.concatenate([np.random.default_rng(0).integers(0, len(size), 37), len(size) - np.array([1, 2, 9])])
    unrolled = size + size
    for start in starts.tolist():
        batch = corpus._batch(corpus.train, np.array([start]), 16)
        assert batch.target_bytes == sum(unrolled[start + 1 : start + 17])


def test_bits_per_byte_is_the_same_for_every_tokenizer():
    """A model that gives each byte p = 1/8 costs 3 bits a byte, whether its tokens are bytes or pairs of bytes."""
    n_bytes = 1000
    singles = n_bytes * math.log(8)
    pairs = (n_bytes // 2) * math.log(8**2)
    assert bits_per_byte(singles, n_bytes) == pytest.approx(3)
    assert bits_per_byte(pairs, n_bytes) == pytest.approx(3)


def test_isolated_documents_change_where_targets_do(texts):
    corpus = open_corpus(Task(corpus=str(texts), isolate_documents=True))
    batches = [corpus.train_batch(step, batch_size=4, context=32, seed=0) for step in range(100)]
    batches += list(corpus.val_batches(batch_size=4, context=32, max_tokens=10**9))
    n_turns = 0
    for batch in batches:
        assert batch.seq_idx.shape == batch.inputs.shape
        assert batch.seq_idx.dtype == np.int32
        for inputs, numbers in zip(batch.inputs, batch.seq_idx, strict=True):
            expected, number = [0], 0
            for token in inputs[1:]:  # the end of a document, as an input, predicts the first token of the next
                number += token == 256
                expected.append(number)
            assert numbers.tolist() == expected
            n_turns += number
    assert n_turns > 100


def test_isolated_documents_over_the_end_of_the_ring():
    stream = Stream(np.array([1, 2, 9, 3, 9, 4, 5, 9]), np.array([3, 5, 8]), None)
    assert stream.read(np.array([6, 7]), 5).tolist() == [[5, 9, 1, 2, 9], [9, 1, 2, 9, 3]]
    assert stream.documents(np.array([6, 7, 0]), 5).tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 2], [0, 0, 0, 1, 1]]
    stream = Stream(np.array([1, 2, 3, 4]), np.array([2, 4]), np.array([10, 20]))
    assert [stream.rest_bytes(np.array([start]), 2) for start in range(4)] == [10, 10, 20, 20]
    assert stream.rest_bytes(np.array([3, 0]), 4) == 60


def test_windows_longer_than_the_corpus(corpus):
    n_val, n_train = len(corpus.val), len(corpus.train)
    with pytest.raises(DataError, match=rf"held-out part of corpus .* has {n_val} tokens, fewer than one window"):
        corpus.val_batches(batch_size=1, context=n_val, max_tokens=10**6)
    with pytest.raises(DataError, match=rf"training part of corpus .* has {n_train} tokens.*smaller context"):
        corpus.train_batch(0, batch_size=1, context=n_train, seed=0)
    whole = corpus.train_batch(5, batch_size=1, context=n_train - 1, seed=0)
    assert whole.inputs.shape == (1, n_train - 1)
