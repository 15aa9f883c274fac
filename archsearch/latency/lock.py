"""One lock per device: many trainers may step at once, a measurement has the device for itself.

Two `flock`ed files, so that the kernel lets go of whatever a killed process held. `main` is shared by training steps
and exclusive to a measurement. `turnstile` keeps a stream of trainers from starving a measurement: everybody passes
through it, and a measurement stays in it, so trainers that come later wait until it has had its turn.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType


def device_key(device: str) -> str:
    """What names the physical device on this machine: `cpu`, or the UUID behind a CUDA index.

    The index alone would not do: CUDA_VISIBLE_DEVICES numbers the same card differently in different processes.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return re.sub(r"\W", "-", device)
    import torch

    chosen = int(index) if index else torch.cuda.current_device()
    return f"cuda-{torch.cuda.get_device_properties(chosen).uuid}"


def lock_folder() -> Path:
    """A folder of this user's own in the machine's temp folder. Raises PermissionError if somebody else made it."""
    folder = Path(tempfile.gettempdir()) / f"archsearch-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own")
    return folder


class DeviceLock:
    """The lock of one physical device; one instance is for one thread, and nothing nests.

    Work queued on the device must be over (synchronised) before either context is left. Two instances in one process
    are strangers to each other: to ask one for `exclusive` while holding the other waits for ever.
    """

    def __init__(self, device: str) -> None:
        stem = lock_folder() / device_key(device)
        self.turnstile = _open(f"{stem}.turnstile")
        self.main = _open(f"{stem}.main")
        self.is_held = False
        self._shared = _Shared(self)

    def shared(self) -> AbstractContextManager[None]:
        """Context of training steps; waits while a measurement runs or stands in line."""
        return self._shared

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Context of a measurement; waits until every trainer is between two steps."""
        assert not self.is_held, "a device lock does not nest"
        fcntl.flock(self.turnstile, fcntl.LOCK_EX)
        try:
            fcntl.flock(self.main, fcntl.LOCK_EX)
            self.is_held = True
            try:
                yield
            finally:
                self.is_held = False
                fcntl.flock(self.main, fcntl.LOCK_UN)
        finally:
            fcntl.flock(self.turnstile, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close both files; the lock is of no use afterwards."""
        os.close(self.turnstile)
        os.close(self.main)


class _Shared:
    """A context without a generator, because it is entered at every training step."""

    def __init__(self, lock: DeviceLock) -> None:
        self.lock = lock

    def __enter__(self) -> None:
        lock = self.lock
        assert not lock.is_held, "a device lock does not nest"
        fcntl.flock(lock.turnstile, fcntl.LOCK_SH)
        try:
            fcntl.flock(lock.main, fcntl.LOCK_SH)
        finally:
            fcntl.flock(lock.turnstile, fcntl.LOCK_UN)
        lock.is_held = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.lock.is_held = False
        fcntl.flock(self.lock.main, fcntl.LOCK_UN)


def _open(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
