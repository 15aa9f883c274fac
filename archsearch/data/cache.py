"""Where packed corpora are kept, and how a folder is made by one process while others look on."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from archsearch.errors import DataError

try:
    import fcntl
except ImportError:  # Windows: two processes may then do the same work, and the first to finish wins
    fcntl = None  # type: ignore[assignment]

CORPORA = "corpora"  # the cache's folder of packed corpora
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # file systems without flock, some network ones
BUSY = (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES)  # what renaming onto a folder says, by platform


def cache_dir() -> Path:
    """`$ARCHSEARCH_CACHE`, else archsearch under `$XDG_CACHE_HOME`, else `~/.cache/archsearch`."""
    if own := os.environ.get("ARCHSEARCH_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache").absolute() / "archsearch"


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`; yields whether it is held (False where the platform or file system has no locks)."""
    with path.open("a") as file:
        held = False
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                held = True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        yield held  # closing the file releases the lock, as does the death of the process


def build_folder(folder: Path, fill: Callable[[Path], None], is_done: Callable[[Path], bool]) -> None:
    """Make `folder` by `fill(its future content)`; nobody ever sees it half full.

    What stood there before is replaced, unless `is_done(folder)` by then: another process was faster.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        made = work / "new"
        made.mkdir()
        fill(made)
        if is_done(folder):
            return
        try:
            with suppress(FileNotFoundError):
                folder.rename(work / "old")
            made.rename(folder)
        except OSError as error:
            if error.errno not in BUSY or not is_done(folder):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def cached_folder(name: str, fill: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    """The folder `name` of the cache's corpora, filled by the first process that asks and again when it is damaged.

    Raises DataError where the cache cannot be written.
    """
    folder = cache_dir() / CORPORA / name
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{name}.lock")) as held:
            if not is_whole(folder):
                if held:  # whoever left these was killed
                    for left in folder.parent.glob(f"{name}.tmp-*"):
                        shutil.rmtree(left, ignore_errors=True)
                build_folder(folder, fill, is_whole)
    except OSError as error:
        raise DataError(
            f"cannot write the cache {folder.parent}: {error.strerror}; point ARCHSEARCH_CACHE at a folder with room"
        ) from error
    return folder
