"""How much memory a piece of work needs at once, and whether an error means that there was not enough."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from archsearch.errors import OutOfMemoryError

MESSAGES = (
    "can't allocate memory",  # the CPU allocator
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA calls that do not go through the allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error, of torch or of ours, says that memory ran out."""
    if isinstance(error, OutOfMemoryError | torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


@contextmanager
def out_of_memory_named(what: str) -> Iterator[None]:
    """Raise OutOfMemoryError, which says during `what`, in place of whatever says so inside."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise OutOfMemoryError(f"out of memory during {what}: {detail}") from error


def peak_bytes(model: nn.Module, work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that the model's tensors and those of `work` take at once.

    CUDA: the allocator's own record, on top of which come the context and the allocator's reserve. Elsewhere: live
    tensors counted operation by operation, since the process's resident size also holds what was freed long ago;
    scratch space inside an operation is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    live = _LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        live.watch(tensor)
    with live:
        work()
    return live.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the storages that operations return, and subtracts them when they die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: set[int] = set()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the method above in what imports torch._dynamo: seconds

    def watch(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it dies; views share one."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self.alive:
            self.alive.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._died, address, size).atexit = False

    def _died(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size
