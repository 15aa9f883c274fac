"""A disk that takes no more: how its errors are known, and what a person can do. No trial is to blame for them."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from archsearch.errors import RunError, UserError

REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there or have the quota raised",
    errno.EROFS: "make that file system writable again",
}
AGAIN = "give the same command again (a study goes on where it stopped)"
NUMBER = re.compile(r"\(os error (\d+)\)")  # how libraries written in Rust, such as safetensors, say an errno


def refused(error: BaseException, path: Path | str | None = None) -> str | None:
    """A sentence with the path and the way out, if an error or what it came from is a disk's that takes no more; None
    of any other error. `path` is named where the error names none.
    """
    one: BaseException | None = error
    while one is not None:
        number = _errno(one)
        if number in REMEDIES:
            if isinstance(error, UserError):
                return str(error)  # it was explained where it was raised
            named = getattr(one, "filename", None) or path or _place(one)
            return f"{named}: {os.strerror(number)}; {REMEDIES[number]} and {AGAIN}"
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What a disk that takes no more raises, as a RunError; of other errors nothing changes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (why := refused(error, path)) is None:
            raise
        raise RunError(why) from error


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = NUMBER.search(str(error))
    return int(found[1]) if found else None


def _place(error: BaseException) -> str:
    """The line that wrote, for errors that name no file."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"a write in {frames[-1].filename}, line {frames[-1].lineno}" if frames else "a write"
