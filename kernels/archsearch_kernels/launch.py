"""A Triton kernel that can be tuned: launch parameters from a table, every launch recordable and repeatable.

    @kernel("gla", configs=grid(BV=(32, 64), num_warps=(4, 8), num_stages=(2, 3)))
    @triton.jit
    def gla_states(q, T, K: tl.constexpr, BV: tl.constexpr): ...

    gla_states.launch(lambda c: (cdiv(V, c["BV"]), BH), {"q": q, "T": T, "K": K}, sizes={"T": T, "BH": BH})

What a launch fixes (constexpr flags, dtypes, sizes rounded up to powers of two) is its key; `configs` lists what is
left open, first the one to take when nothing was measured. Kernels write their outputs whole and accumulate nothing in
memory, so a recorded launch may be repeated with any configuration.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Config = Mapping[str, int]  # block sizes by name, and num_warps, num_stages
Grid = Callable[[Config], tuple[int, ...]]
Arguments = Mapping[str, Any]
Configs = Callable[[Arguments], Sequence[Config]]

LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")

KERNELS: dict[str, Kernel] = {}  # every kernel that has been imported, by name


@dataclass(frozen=True)
class Key:
    """What configurations may differ by: names a row of the tuning table together with the kernel and the device."""

    kernel: str
    dtypes: tuple[str, ...]
    flags: tuple[tuple[str, Any], ...]
    bucket: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Launch:
    """One launch as it was made; `run` repeats it with another configuration."""

    kernel: Kernel
    grid: Grid
    arguments: Arguments
    key: Key

    def run(self, config: Config) -> None:
        """Launch with these parameters; outputs are written over."""
        self.kernel.settle()
        self.kernel.fn[self.grid(config)](**self.arguments, **config)


class Kernel:
    """A jitted function with the configurations it may run in."""

    def __init__(self, op: str, fn: Any, configs: Configs) -> None:
        self.op = op
        self.fn = fn
        self.name = fn.__name__
        self.configs = configs
        self.python = fn.fn  # the function as written, whoever runs it
        constexpr = {"constexpr", "tl.constexpr", "triton.language.constexpr"}
        self.parameters = inspect.signature(self.python).parameters
        self.constexprs = {
            n for n, p in self.parameters.items() if getattr(p.annotation, "__name__", p.annotation) in constexpr
        }
        self.unspecialized = {p.name for p in getattr(fn, "params", ()) if p.do_not_specialize}
        self._settled = False
        self._chosen: dict[Key, Config] = {}
        self._ready: dict[tuple[Any, ...] | None, tuple[Config, Any]] = {}  # compiled, by what takes less time to make

    def launch(self, grid: Grid, arguments: Arguments, *, sizes: Mapping[str, int]) -> None:
        """Launch with the best known configuration.

        grid: config -> programs. arguments: everything but the configuration, by name. sizes: what the best
        configuration depends on besides flags and dtypes; only the next power of two counts.
        """
        device = next((a.device for a in arguments.values() if isinstance(a, torch.Tensor)), None)
        if device is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # of a model that is spread over several
                self.launch(grid, arguments, sizes=sizes)
            return
        if _recorders:
            for record in _recorders:
                record.append(Launch(self, grid, arguments, self.key(arguments, sizes)))
        if _dry:
            _make_safe(arguments)
            return
        exact = None if self.name in _forced else self._exactly(arguments, sizes, device)
        if (ready := self._ready.get(exact)) is not None:
            known, compiled = ready
            given = {**arguments, **known}
            compiled[(*grid(known), 1, 1)[:3]](*[given[n] for n in self.parameters])
            return
        config = _forced.get(self.name)
        if config is None:
            key = self.key(arguments, sizes)
            config = self._chosen[key] = self._chosen.get(key) or choose(self, key, arguments)
        self.settle()
        compiled = self.fn[grid(config)](**arguments, **config)
        if exact is not None and compiled is not None:  # Triton's interpreter compiles nothing
            self._ready[exact] = config, compiled

    def settle(self) -> None:
        """Before it is compiled: let Triton find the same code in its cache, whatever this process compiled before."""
        if not self._settled:
            _hash_helpers_first(self.fn, set())
        self._settled = True

    def _exactly(
        self, arguments: Arguments, sizes: Mapping[str, int], device: torch.device | None
    ) -> tuple[Any, ...] | None:
        """Equal only for launches of one key for which Triton runs the same compiled kernel; None: it cannot be told.

        Triton takes a third of a small operation's time on the host to find that kernel. It tells pointers apart by
        whether they are divisible by 16, and integers by that, by whether they are 1 or need 64 bits.
        """
        found: list[Any] = [device, *arguments]
        for name, a in arguments.items():
            if a is None or name in self.constexprs:
                found.append(a)
            elif isinstance(a, torch.Tensor):
                found.append((a.dtype, a.data_ptr() % 16 == 0))
            elif type(a) is int:
                wide = not -(2**31) <= a < 2**31
                found.append(wide if name in self.unspecialized else 2 if a == 1 else 4 + 2 * wide + (a % 16 == 0))
            elif type(a) is float:
                found.append(float)
            else:
                return None
        return (*found, *[max(0, int(s) - 1).bit_length() for s in sizes.values()])

    def key(self, arguments: Arguments, sizes: Mapping[str, int]) -> Key:
        """The key of such a launch."""
        dtypes = tuple(str(a.dtype)[6:] for a in arguments.values() if isinstance(a, torch.Tensor))
        missing = tuple((n, None) for n, a in arguments.items() if a is None and n not in self.constexprs)
        flags = tuple((n, a) for n, a in arguments.items() if n in self.constexprs)
        bucket = tuple((n, 1 << max(0, int(s) - 1).bit_length()) for n, s in sizes.items())
        return Key(self.name, dtypes, flags + missing, bucket)

    def chosen(self, key: Key) -> Config | None:
        """What launches with this key run in; None before the first."""
        return self._chosen.get(key)

    def forget(self) -> None:
        """Look configurations up anew: the tables have changed."""
        self._chosen.clear()
        self._ready.clear()


def _hash_helpers_first(fn: Any, seen: set[int]) -> None:
    """Hash a jitted function behind all that it calls.

    Triton (3.6, 3.7) hashes a helper's constants into its caller only if the helper had been hashed before: of two
    kernels with a helper, the first to be compiled in a process has another hash than where it is the second.
    """
    if not hasattr(type(fn), "cache_key") or id(fn) in seen:  # interpreted, a constant, or somebody else's
        return
    seen.add(id(fn))
    for name in fn.fn.__code__.co_names:
        _hash_helpers_first(fn.fn.__globals__.get(name), seen)
    fn.cache_key  # noqa: B018  (computed once, when it is first asked for)


def kernel(op: str, *, configs: Configs | Sequence[Config]) -> Callable[[Any], Kernel]:
    """Make a `@triton.jit` function a Kernel of `op`.

    configs: the candidates, the analytic default first, or a function of the launch's arguments that returns them.
    """

    def wrap(fn: Any) -> Kernel:
        made = Kernel(op, fn, configs if callable(configs) else lambda arguments: configs)
        assert made.name not in KERNELS, f"two kernels are called {made.name}"
        KERNELS[made.name] = made
        return made

    return wrap


def grid(**options: Sequence[int]) -> list[Config]:
    """All combinations of the options, in their order."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def choose(kernel: Kernel, key: Key, arguments: Arguments) -> Config:
    """The configuration of the tuning tables, else the first candidate that they do not exclude."""
    from archsearch_kernels.tuner.lookup import best, default  # the tables are read when the first kernel runs

    candidates = kernel.configs(arguments)
    return best(kernel, key, candidates) or default(kernel, key, candidates)


_recorders: list[list[Launch]] = []
_dry: list[bool] = []  # not empty: launches are recorded and not made
_forced: dict[str, Config] = {}


@contextmanager
def recording(*, dry: bool = False) -> Iterator[list[Launch]]:
    """Collects the launches made inside.

    dry: none is made, so nothing is compiled. Floating-point outputs hold anything; all integers are 0, lest what
    reads them as indices or offsets leave a tensor. A workload recorded so has to be made anew before it is run.
    """
    launches: list[Launch] = []
    _recorders.append(launches)
    _dry.extend([True] * dry)
    try:
        yield launches
    finally:
        _recorders[:] = [record for record in _recorders if record is not launches]
        del _dry[len(_dry) - dry :]


def _make_safe(arguments: Arguments) -> None:
    for a in arguments.values():
        if isinstance(a, torch.Tensor) and not a.is_floating_point():
            a.data.zero_()  # past autograd, which has saved some of them


@contextmanager
def forcing(kernel: str, config: Config) -> Iterator[None]:
    """Inside, `kernel` runs in this configuration, whatever the tables say."""
    before = dict(_forced)
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
