"""Tokenizers: ids, ends of documents, and the bytes of text behind every id against direct counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from archsearch.data.corpora import find_corpus
from archsearch.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_of
from archsearch.errors import DataError

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "Füße, naïve café, 你好, 𝄞 and 🙂🙂\n\n\n",
    "for line in lines:\n\tprint(line)   \n",
    "The quick brown fox jumps over the lazy dog. <|endoftext|> is text here.",
]


def byte_level(path: Path, special: tuple[str, ...] = ("<|endoftext|>",), prefix_space: bool = False) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.save(str(path))
    return path


def bytes_of(tokenizer: Tokenizer, text: str) -> int:
    (ids,) = tokenizer.encode([text.encode()])
    return int(tokenizer.token_bytes[ids].sum())


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert len(tokenizer.token_bytes) == 257
    (ids,) = tokenizer.encode(["é\n".encode()])
    assert ids.tolist() == [0xC3, 0xA9, 10, 256]
    assert tokenizer.token_bytes[ids].tolist() == [1, 1, 1, 0]


def test_byte_level_counts_are_exact_for_every_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = byte_level(tmp_path / "bpe.json")
    tokenizer = load_tokenizer("bpe.json", tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(path))
    decode = {char: byte for byte, char in gpt2_alphabet().items()}
    for token, index in plain.get_vocab().items():
        expected = 0 if token == "<|endoftext|>" else len(bytes(decode[char] for char in token))
        assert tokenizer.token_bytes[index] == expected, token
    assert tokenizer.token_bytes.max() > 3, "the vocabulary has merges"
    for text in TEXTS[:3]:
        assert bytes_of(tokenizer, text) == len(text.encode())
        (ids,) = tokenizer.encode([text.encode()])
        assert plain.decode(ids.tolist()) == text
        assert ids[-1] == tokenizer.end_id == plain.token_to_id("<|endoftext|>")


def gpt2_alphabet() -> dict[int, str]:
    """Byte to character, as GPT-2's encoder.py defines it: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def test_end_of_document_is_added_where_the_vocabulary_has_none(tmp_path):
    byte_level(tmp_path / "bpe.json", special=())
    tokenizer = load_tokenizer("bpe.json", tmp_path)
    (ids,) = tokenizer.encode([b"x"])
    assert ids[-1] == tokenizer.end_id == len(tokenizer.token_bytes) - 1
    assert tokenizer.token_bytes[tokenizer.end_id] == 0


def test_settings_of_the_file_do_not_cut_or_pad(tmp_path):
    path = byte_level(tmp_path / "bpe.json")
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer("bpe.json", tmp_path)
    once = tokenizer.encode([text.encode() for text in TEXTS])
    again = tokenizer.encode([text.encode() for text in TEXTS])
    assert [ids.tolist() for ids in once] == [ids.tolist() for ids in again]
    for ids, text in zip(once[:3], TEXTS[:3], strict=True):
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_word_pieces_and_meta_spaces_count_their_text(tmp_path):
    pytest.importorskip("tokenizers")
    pieces = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": "[UNK]",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "play": 1, "##ing": 2, "é": 3},
        },
    }
    (tmp_path / "pieces.json").write_text(json.dumps(pieces))
    tokenizer = load_tokenizer("pieces.json", tmp_path)
    assert tokenizer.token_bytes.tolist() == [0, 4, 3, 2, 0]
    (ids,) = tokenizer.encode(["playing é".encode()])
    assert ids.tolist() == [1, 2, 3, 4]
    meta = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {"<0xC3>": 0, "▁": 1, "a": 2, "▁a": 3},
            "merges": ["▁ a"],
        },
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    tokenizer = load_tokenizer("meta.json", tmp_path)
    assert tokenizer.token_bytes.tolist() == [1, 1, 1, 2, 0]
    assert bytes_of(tokenizer, "a a") == len("a a") + 1, "one space is put in front; packing books it"


def test_mistakes(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text('{"model": "nothing"}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer 'tokeniser\.json' not found.*Did you mean 'tokenizer\.json'"):
        load_tokenizer("tokeniser.json", tmp_path)
    with pytest.raises(DataError, match=r"expected bytes or the path.*Did you mean 'bytes'"):
        load_tokenizer("byte", tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(".", tmp_path)
    with pytest.raises(DataError, match="found a list; expected an object"):
        load_tokenizer("list.json", tmp_path)
    with pytest.raises(DataError, match="is not JSON"):
        load_tokenizer("broken.json", tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'archsearch\[tokenizers\]'"):
        load_tokenizer("tokenizer.json", tmp_path)


def test_token_files_need_to_know_their_bytes(tmp_path):
    np.array([0, 1, 2, 3], dtype="<u2").tofile(tmp_path / "t.bin")
    source = find_corpus("t.bin", tmp_path)
    with pytest.raises(DataError, match=r"t\.bin holds token ids, and bits per byte needs .*t\.bin\.json"):
        tokenizer_of(source, "bytes", tmp_path)
    sidecar = tmp_path / "t.bin.json"
    sidecar.write_text('{"token_bytes": [1, 2, 0], "end_of_document": 2}')
    tokenizer = tokenizer_of(source, "bytes", tmp_path)
    assert tokenizer.end_id == 2
    assert tokenizer.encode([np.array([0, 1, 2], dtype="<u2").tobytes()])[0].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"holds token 3 but t\.bin\.json ends at 2.*header"):
        tokenizer.encode([np.array([0, 3], dtype="<u2").tobytes()])
    for content, message in (
        ({"token_bytes": "4"}, "'token_bytes' must be a list of whole numbers"),
        ({"token_bytes": [1, -1]}, "'token_bytes' must be a list of whole numbers"),
        ({"token_bytes": [1, 2], "end_of_document": 2}, "'end_of_document' is 2; expected null or an id below 2"),
        ({"token_bytes": [1] * 70_000}, r"70000 ids; a \.bin of uint16 tokens cannot hold more than 65536"),
    ):
        sidecar.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            tokenizer_of(source, "bytes", tmp_path)


def test_token_files_with_a_tokenizer(tmp_path):
    byte_level(tmp_path / "bpe.json")
    text = load_tokenizer("bpe.json", tmp_path)
    np.array([0], dtype="<u2").tofile(tmp_path / "t.bin")
    tokens = tokenizer_of(find_corpus("t.bin", tmp_path), "bpe.json", tmp_path)
    assert tokens.token_bytes.tolist() == text.token_bytes.tolist()
    assert tokens.end_id == text.end_id
    assert tokens.content == text.content == json.loads((tmp_path / "bpe.json").read_text())


def saved(
    path: Path, model: object, pre: object = None, decoder: object = None, normalizer: object = None
) -> Tokenizer:
    """A tokenizer of these parts, as the file is read."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(model)
    for part, value in (("pre_tokenizer", pre), ("decoder", decoder), ("normalizer", normalizer)):
        if value is not None:
            setattr(made, part, value)
    made.save(str(path))
    return load_tokenizer(path.name, path.parent)


def test_tokenizers_that_give_all_text_back(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    documents = [text.encode() for text in [*TEXTS[:3], "  two spaces in front", "x" * 5000]]
    byte_level(tmp_path / "plain.json")
    byte_level(tmp_path / "space.json", prefix_space=True)
    content = json.loads((tmp_path / "plain.json").read_text())
    (tmp_path / "no_decoder.json").write_text(json.dumps({**content, "decoder": None}))
    for name in ("plain.json", "space.json", "no_decoder.json"):
        found = load_tokenizer(name, tmp_path).round_trip(documents)
        assert (found.pieces, found.changed, found.unknown) == (5, 0, 0), name
        assert not found.is_lossy
    fallback = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256}
    parts = tokenizers.decoders
    decoder = parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)])
    meta = saved(
        tmp_path / "meta.json",
        tokenizers.models.BPE(vocab=fallback, merges=[], byte_fallback=True),
        tokenizers.pre_tokenizers.Metaspace(),
        decoder,
    )
    assert meta.round_trip(documents).changed == 0
    assert load_tokenizer("bytes").round_trip(documents) is None


def test_tokenizers_that_lose_text_are_told(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    models, pre, norm = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.normalizers
    documents = [b"the cat and the dog"] * 200
    words = saved(tmp_path / "w.json", models.WordLevel({"the": 0, "cat": 1, "[UNK]": 2}, "[UNK]"), pre.Whitespace())
    found = words.round_trip(documents)
    assert (found.pieces, found.changed, found.tokens, found.unknown) == (64, 64, 320, 128)
    assert found.is_lossy
    told = found.text("w.json")
    assert "w.json loses text: 64 of 64 pieces" in told
    assert "40.0% of its tokens are unknown" in told
    alphabet = {letter: i for i, letter in enumerate(sorted(pre.ByteLevel.alphabet()))}
    parts = (
        models.BPE(vocab=alphabet, merges=[]),
        pre.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    lower = saved(tmp_path / "lower.json", *parts, norm.Lowercase())
    assert lower.round_trip(documents).changed == 0
    assert lower.round_trip([*documents[:3], b"The end"]).changed == 1
    assert "unknown" not in lower.round_trip([b"The end"]).text("lower.json")
    scores = [("<unk>", 0.0), ("a", -1.0), ("▁", -2.0)]
    unigram = saved(tmp_path / "u.json", models.Unigram(scores, 0, False), pre.Metaspace())
    assert unigram.round_trip([b"a b"]).unknown == 1
