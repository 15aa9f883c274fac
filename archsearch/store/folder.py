"""The run folder `runs/<name>/`: append-only records, files replaced as a whole, and a lock that dies with its owner.

Whatever a kill -9 interrupts, the folder stays readable: a record is one line written at once and fsynced, other files
are written beside their place and renamed into it, files that only make sense together are renamed as a folder first,
and the lock is the kernel's (flock), not a file that stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from archsearch.errors import RunError, did_you_mean
from archsearch.store.disk import refused
from archsearch.store.record import TrialRecord, now

TOKENIZER = "tokenizer.json"
BEGUN, WHOLE = ".replacing", ".replaced"  # files that `replacing` writes, and those that now take their places


class RunFolder:
    """`runs/<name>/`: the only way to its files. Reading needs no lock; `create` and `append` take it if need be."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None  # file descriptor while this object holds the lock
        self._is_dirty = False  # whether records were written that the disk may not have

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run; raises RunError naming the nearest one if there is none."""
        folder = cls(path)
        with _explained(folder.path):
            if folder.exists:
                return folder
        if inside := _runs_in(folder.path):
            named = ", ".join(str(folder.path / name) for name in inside)
            raise RunError(f"{folder.path} is not a run folder, it holds some; name one of them: {named}")
        here, name = folder.path.parent, folder.path.name
        beside = _runs_in(here)
        if not beside and name in _runs_in(here / "runs"):
            hint = f" Did you mean '{here / 'runs' / name}'?"
        else:
            hint = f" Runs in {here}: {', '.join(beside)}." if beside else f" There is no run in '{here}' either."
            hint += did_you_mean(name, beside)
        raise RunError(f"{folder.path} is not a run folder.{hint}")

    @property
    def exists(self) -> bool:
        """Whether `create` came to its end here."""
        return (self.path / "settings.json").is_file()

    def create(
        self,
        *,
        space_yaml: str,
        space: Any,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        tokenizer: str | None = None,
    ) -> None:
        """Lay the folder out; `settings.json` comes last and makes it a run. Raises RunError if it is one already.

        `space_yaml` is kept verbatim, `space` is its parsed tree, `tokenizer` the content of the corpus's
        tokenizer.json if there is one. What an interrupted `create` left is overwritten.
        """
        with self._locked():
            if self.exists:
                raise RunError(f"{self.path} holds a run already")
            with _explained(self.path):
                for name in ("checkpoints", "logs"):
                    (self.path / name).mkdir(exist_ok=True)
            self.write_bytes("trials.jsonl", b"")
            self.write_text("space.yaml", space_yaml)
            self.write_json("space.json", space)
            self.write_json("environment.json", environment)
            (self.path / TOKENIZER).unlink(missing_ok=True)
            if tokenizer is not None:
                self.write_text(TOKENIZER, tokenizer)
            self.write_json("settings.json", settings)

    @contextlib.contextmanager
    def lock(self) -> Iterator[Self]:
        """Hold the folder for writing; what a killed writer left (a torn last line, half-written files) is mended.

        Raises RunError with the holder's pid if another process is at it. The kernel frees the lock when the holder
        ends, however it ends; workers do not inherit it.
        """
        assert self._lock is None, "the lock is held already"
        with _explained(self.path):
            self._make()
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with _explained(self.path / ".lock"):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunError(self._held_by(os.pread(handle, 4096, 0))) from None
                owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(owner).encode(), 0)
                self._mend()
            self._lock = handle
            yield self
        finally:
            self._lock = None
            os.close(handle)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            blocked = next(path for path in (self.path, *self.path.parents) if path.exists())
            way = "name a folder with --run-dir"
            if blocked == self.path:
                way = f"move it (mv {blocked} {blocked}.old), or put runs elsewhere with --run-dir"
            raise RunError(f"{blocked} is a file, and the run folder is to be {self.path}: {way}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.nullcontext() if self._lock is not None else self.lock():
            yield

    def _held_by(self, written: bytes) -> str:
        try:
            owner = json.loads(written)
            who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
            way = f"wait for it to end, or stop it with `kill {owner['pid']}` and launch again to resume"
        except (ValueError, KeyError, TypeError):  # the holder has taken the lock and not yet signed
            who, way = "another process", "wait for it to end"
        return f"{self.path} is in use by {who}; {way}"

    def _mend(self) -> None:
        shutil.rmtree(self.path / BEGUN, ignore_errors=True)
        self._put_in_place()
        for left in (*self.path.glob(".*.tmp"), *self.path.glob("checkpoints/.*tmp*")):
            left.unlink(missing_ok=True)
        for name in ("trials.jsonl", "rungs.jsonl"):
            path = self.path / name
            if not path.exists():
                continue
            whole, torn = _split(path.read_bytes())
            if torn is not None:
                os.truncate(path, sum(map(len, whole)))
            elif whole and not whole[-1].endswith(b"\n"):  # a line that lost only its newline
                with path.open("ab") as file:
                    file.write(b"\n")

    def append(self, record: TrialRecord, *, sync: bool = True) -> None:
        """Add one record; when this returns it is on the disk. A write that fails (disk full) leaves no trace.

        sync: whether to wait for the disk now; if not, it is `sync()` that waits, for several records at once.
        """
        self._append("trials.jsonl", record.to_line(), sync)
        self._is_dirty = not sync

    def sync(self) -> None:
        """All records are on the disk when this returns."""
        if self._is_dirty:
            path = self.path / "trials.jsonl"
            with _explained(path):
                sync_path(path)
            self._is_dirty = False

    def append_rung(self, entry: Mapping[str, Any]) -> None:
        """Note in rungs.jsonl that a trial reached a rung: its number, the rung, its readings so far."""
        self._append("rungs.jsonl", json.dumps(entry, allow_nan=False).encode() + b"\n")

    def rungs(self) -> list[dict[str, Any]]:
        """What `append_rung` noted, in order; a torn last line is left out."""
        path = self.path / "rungs.jsonl"
        if not path.exists():
            return []
        with _explained(path):
            whole, _ = _split(path.read_bytes())
        try:
            return [json.loads(line) for line in whole]
        except ValueError as error:
            raise RunError(f"{path} was edited: {error}. Mend it, or remove it to run its trials again") from None

    @contextlib.contextmanager
    def replacing(self) -> Iterator[Self]:
        """Several files replaced as one: what is written to the folder that this yields takes its places when the
        context ends. After a kill or an error all of it has, or none: the next `lock` sees to that. Only under `lock`.
        """
        assert self._lock is not None, "files are replaced by who holds the lock"
        begun = self.path / BEGUN
        try:
            with _explained(begun):
                begun.mkdir()
            yield type(self)(begun)
            with _explained(begun):
                begun.rename(self.path / WHOLE)
                sync_path(self.path)
                self._put_in_place()
        finally:
            shutil.rmtree(begun, ignore_errors=True)

    def _put_in_place(self) -> None:
        """What `replacing` wrote, or what a kill has left of it."""
        whole = self.path / WHOLE
        if whole.is_dir():
            for path in whole.iterdir():
                path.replace(self.path / path.name)
            sync_path(self.path)
            whole.rmdir()

    def _append(self, name: str, line: bytes, sync: bool = True) -> None:
        path = self.path / name
        with self._locked(), _explained(path):
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                before = os.fstat(handle).st_size
                try:
                    if os.write(handle, line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    if sync:
                        os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, before)
                    raise
            finally:
                os.close(handle)

    def records(self) -> list[TrialRecord]:
        """All records in order. A torn last line is left out; any other line that is no record raises RunError."""
        path = self.path / "trials.jsonl"
        if not path.exists():
            return []
        with _explained(path):
            whole, _ = _split(path.read_bytes())
        found = []
        for number, line in enumerate(whole, 1):
            try:
                found.append(TrialRecord.model_validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                raise RunError(
                    f"{path}:{number}: not a trial record ({where + ': ' if where else ''}{first['msg']}); the file "
                    "was edited or written by another version. Mend or remove that line, keeping a copy."
                ) from None
        return found

    def write_bytes(self, name: str, data: bytes) -> None:
        """Replace a file of the folder as a whole: a reader sees the old one or the new one."""
        path = self.inside(name)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with _explained(path):
            try:
                with beside.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            sync_path(path.parent)  # the rename itself

    def write_text(self, name: str, text: str) -> None:
        """`write_bytes` of UTF-8."""
        self.write_bytes(name, text.encode("utf-8", "backslashreplace"))

    def write_json(self, name: str, data: Any) -> None:
        """`write_text` of indented JSON; raises ValueError on NaN, which JSON does not know."""
        self.write_text(name, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote; raises RunError if it is missing or is no JSON."""
        path = self.inside(name)
        with _explained(path):
            data = path.read_bytes()
        try:
            return json.loads(data)
        except ValueError as error:
            raise RunError(f"{path} is not JSON: {error}") from None

    def inside(self, name: str) -> Path:
        """The path of a file of the folder; raises RunError if the name leads out of it."""
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise RunError(f"{name} leads out of {self.path}")
        return path


def _runs_in(folder: Path) -> list[str]:
    """Names of the run folders that lie directly in a folder."""
    if not folder.is_dir():
        return []
    with _explained(folder):
        return sorted(path.name for path in folder.iterdir() if (path / "settings.json").is_file())


def _split(data: bytes) -> tuple[list[bytes], bytes | None]:
    """The whole lines and the torn last one. A line that lost only its newline counts as whole."""
    *lines, rest = data.split(b"\n")
    whole = [line + b"\n" for line in lines]
    if not rest:
        return whole, None
    try:
        json.loads(rest)
    except ValueError:
        return whole, rest
    return [*whole, rest], None


def sync_path(path: Path) -> None:
    """What was written to a file, or renamed in a folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the file system refuses, as a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(refused(error, path) or f"{error.filename or path}: {error.strerror or error}") from error
