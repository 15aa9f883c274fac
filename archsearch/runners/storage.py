"""Where checkpoints of a cluster's trials lie while they are needed: any place that fsspec can reach.

A worker trains with a file of its own; what it saves is copied here, and a worker elsewhere goes on from the copy.
There is at most one file per trial on its way, and none once the study is over.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from archsearch.errors import RunError

LOCAL = ("file", "local")


@dataclass(frozen=True)
class Storage:
    """A folder of checkpoints, one per trial. root: a path (local or NFS) or a URL such as `s3://bucket/studies`."""

    root: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        try:
            system, path = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise RunError(f"runtime.storage {self.root!r}: {error}") from error
        return system, path.rstrip("/")

    def _path(self, trial: int) -> str:
        return f"{self._place[1]}/{trial}.safetensors"

    def check(self) -> None:
        """Raise RunError if the place cannot be written to."""
        try:
            self._place[0].makedirs(self._place[1], exist_ok=True)
        except Exception as error:  # every file system raises errors of its own
            raise RunError(f"runtime.storage {self.root!r} cannot be used: {type(error).__name__}: {error}") from error

    def has(self, trial: int) -> bool:
        """Whether there is a checkpoint of this trial."""
        return bool(self._place[0].exists(self._path(trial)))

    def pull(self, trial: int, file: Path) -> bool:
        """Copy a trial's checkpoint to `file`, whole or not at all; False if there is none."""
        if not self.has(trial):
            return False
        beside = file.with_name(f".{file.name}.pull.tmp")
        try:
            self._place[0].get_file(self._path(trial), str(beside))
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
        return True

    def push(self, trial: int, file: Path) -> None:
        """Copy `file` here, replacing what was there; nobody sees half a file."""
        system, path = self._place[0], self._path(trial)
        system.makedirs(self._place[1], exist_ok=True)
        if not set(LOCAL) & set([system.protocol] if isinstance(system.protocol, str) else system.protocol):
            system.put_file(str(file), path)  # object stores show an object once it is whole
            return
        beside = Path(tempfile.mkdtemp(prefix=".push-", dir=self._place[1]))
        try:
            shutil.copyfile(file, beside / "new")
            (beside / "new").replace(path)
        finally:
            shutil.rmtree(beside)

    def delete(self, trial: int) -> None:
        """Drop a trial's checkpoint, if there is one."""
        if self.has(trial):
            self._place[0].rm_file(self._path(trial))

    def clear(self) -> None:
        """Drop the whole folder: the study is over."""
        if self._place[0].exists(self._place[1]):
            self._place[0].rm(self._place[1], recursive=True)

    @contextmanager
    def staged(self, job: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[[], str | None]]]:
        """A job whose checkpoint is a file of this machine, and what copies it here when it has changed.

        The second returns what went wrong, if anything: a storage that is away for a minute costs no training. When
        the context is left the last state must arrive, so there errors are raised.
        """
        with tempfile.TemporaryDirectory(prefix="archsearch-trial-") as folder:
            file = Path(folder) / f"{job['job']}.safetensors"
            self.pull(job["job"], file)
            seen = _stamp(file)

            def save() -> None:
                nonlocal seen
                if (stamp := _stamp(file)) != seen:
                    self.push(job["job"], file)
                    seen = stamp

            def try_to_save() -> str | None:
                try:
                    save()
                except Exception as error:  # told to the driver, tried again at the next report
                    return f"{type(error).__name__}: {error}"
                return None

            yield {**job, "checkpoint": str(file)}, try_to_save
            save()


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file is replaced."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
