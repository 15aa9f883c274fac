"""Times a whole model with random weights: prefill, decode, train step; and reads its memory.

Whoever measures holds the device's lock meanwhile (`archsearch.latency.lock`). On CUDA, decoding is replayed from a
graph, as serving engines run it: launched one by one, the kernels of a token wait for Python. A model that cannot be
captured (a mixer of somebody else's that asks the host) is launched one by one, and its timing says so.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from archsearch.architecture import ModelSpec
from archsearch.errors import OutOfMemoryError
from archsearch.latency.memory import out_of_memory_named, peak_bytes
from archsearch.model import DecodeState, build_model
from archsearch.optimizer import AdamW
from archsearch.store.record import NOISY

log = logging.getLogger(__name__)
MIN_WARMUP, MAX_WARMUP = 3, 10
STILL_WARMING = 0.95  # a run this much faster than the best before says that the device has not settled
MIN_REPEATS = 5
MAX_SECONDS = 10.0
AGAIN = 2  # so often what is noisy is measured again
STATE_STD = 0.02


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median, spread and mean over `n` runs after `warmup` others; `graphed`: replayed."""

    p50: float
    p10: float
    p90: float
    mean: float
    n: int
    warmup: int
    graphed: bool = False

    @classmethod
    def of(cls, runs_ms: list[float], warmup: int, graphed: bool = False) -> Timing:
        """From the single runs."""
        p10, p50, p90 = np.percentile(runs_ms, (10, 50, 90)).tolist()
        return cls(p50, p10, p90, sum(runs_ms) / len(runs_ms), len(runs_ms), warmup, graphed)

    @property
    def noise(self) -> float:
        """Half of p10 to p90, as a share of the median."""
        return (self.p90 - self.p10) / 2 / self.p50

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timing:
        """The inverse of `to_json`."""
        return cls(**data)


Run = Callable[[], object]
Prepare = Callable[[int], Run]  # what is not timed of run number i, and what is
Work = AbstractContextManager[Prepare]


class Bench:
    """One model with random weights in its spec's dtype, built straight on the device; serves several measurements.

    Each timing has at most `repeats` runs and at least MIN_REPEATS; between these it stops after `max_seconds`, warm-up
    included. One whose noise is above NOISY is made again, AGAIN times at most, and the quietest counts. `threads`: CPU
    threads while measuring (None: as they are). Use it as a context, or close it, to free the memory. Everything raises
    OutOfMemoryError where the device has no room.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: str = "cpu",
        *,
        seed: int = 0,
        threads: int | None = None,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.threads = threads
        self.max_seconds = max_seconds
        self._random = torch.Generator(self.device).manual_seed(seed)
        with out_of_memory_named("building the model"):
            self.model = build_model(spec, seed, device, getattr(torch, spec.dtype)).eval()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop the model and hand its memory back."""
        del self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prefill(self, *, context: int, batch: int = 1, repeats: int = 20) -> Timing:
        """From `batch` prompts of `context` tokens to the logits of their next tokens, caches filled."""
        return self._time("prefill", self._prefill(context, batch), repeats)

    def decode(self, *, context: int, batch: int = 1, repeats: int = 20) -> Timing:
        """One token as number `context` of `batch` sequences, with random caches and states before it."""
        graphed = self.device.type == "cuda" and self._can_capture(context, batch)
        work = self._decode_graphed(context, batch) if graphed else self._decode(context, batch)
        return self._time("decoding", work, repeats, graphed)

    def train_step(self, *, context: int, batch: int = 1, repeats: int = 20) -> Timing:
        """Forward, backward and AdamW on `batch` rows of `context` random tokens, all of it in the spec's dtype."""
        return self._time("a training step", self._train_step(context, batch), repeats)

    def state_bytes(self, *, context: int, batch: int = 1) -> int:
        """Bytes of the tensors that decoding `batch` sequences of up to `context` tokens keeps."""
        with out_of_memory_named("allocating the decode state"), torch.inference_mode():
            return self.model.init_state(batch, context).num_bytes()

    def peak_memory(
        self, *, context: int, batch: int = 1, work: Literal["prefill", "decode", "train_step"] = "decode"
    ) -> int:
        """Most bytes in use at once during `work`, weights included."""

        def twice() -> None:  # the optimiser's moments exist from the second step on
            with {"prefill": self._prefill, "decode": self._decode, "train_step": self._train_step}[work](
                context, batch
            ) as prepare:
                for i in range(2):
                    prepare(i)()

        with out_of_memory_named(work):
            return peak_bytes(self.model, twice, self.device)

    @contextmanager
    def _prefill(self, context: int, batch: int) -> Iterator[Prepare]:
        with torch.inference_mode():
            tokens = self._tokens(batch, context)

            def prepare(i: int) -> Run:
                state = self.model.init_state(batch, context)
                return lambda: self.model.extend(tokens, state, last_only=True)

            yield prepare

    @contextmanager
    def _decode(self, context: int, batch: int) -> Iterator[Prepare]:
        with torch.inference_mode():
            state = self._filled_state(context, batch)

            def prepare(i: int) -> Run:
                # another token for each run: the same one would find its experts' weights in the CPU's cache
                token = self._tokens(batch, 1)
                state.position = context - 1
                return lambda: self.model.extend(token, state)

            yield prepare

    def _can_capture(self, context: int, batch: int) -> bool:
        """Whether decoding can be captured; why not is said once per reason."""
        try:
            with out_of_memory_named("decoding"), self._decode_graphed(context, batch) as prepare:
                prepare(0)()
                torch.cuda.synchronize(self.device)
        except OutOfMemoryError:
            raise
        except (RuntimeError, torch.AcceleratorError) as problem:
            torch.cuda.synchronize(self.device)
            _say_once(str(problem).splitlines()[0])
            return False
        return True

    @contextmanager
    def _decode_graphed(self, context: int, batch: int) -> Iterator[Prepare]:
        with torch.inference_mode(), torch.cuda.device(self.device):
            token, state = self._tokens(batch, 1), self._filled_state(context, batch)

            def step() -> None:
                state.position = context - 1
                self.model.extend(token, state)

            beside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # what is set up at first use must not be captured
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()

            def replay(i: int) -> Run:
                token.copy_(self._tokens(batch, 1))
                return graph.replay

            yield replay

    @contextmanager
    def _train_step(self, context: int, batch: int) -> Iterator[Prepare]:
        # at a learning rate of 0 the work is the same and the weights stay what they were
        optimizer = AdamW(self.model.parameters(), lr=0.0, fused=True)
        tokens = self._tokens(batch, context + 1)

        def step() -> None:
            logits = self.model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        self.model.train()
        try:
            yield lambda i: step
        finally:
            optimizer.zero_grad()
            self.model.eval()

    def _filled_state(self, context: int, batch: int) -> DecodeState:
        """Caches and states with random numbers in them."""
        state = self.model.init_state(batch, context)
        for tensor in (t for block in state.blocks for t in block.values() if t.is_floating_point()):
            tensor.normal_(std=STATE_STD, generator=self._random)
        return state

    def _tokens(self, *shape: int) -> Tensor:
        return torch.randint(self.spec.vocab_size, shape, device=self.device, generator=self._random)

    def _time(self, what: str, work: Work, repeats: int, graphed: bool = False) -> Timing:
        with out_of_memory_named(what), work as prepare, self._undisturbed():
            quietest = self._time_once(prepare, repeats, graphed)
            for _ in range(AGAIN):
                if quietest.noise > NOISY:
                    quietest = min(
                        quietest, self._time_once(prepare, repeats, graphed), key=lambda timing: timing.noise
                    )
            return quietest

    def _time_once(self, prepare: Prepare, repeats: int, graphed: bool) -> Timing:
        clock = _cuda_ms if self.device.type == "cuda" else _wall_ms
        began = time.perf_counter()
        warmup = [clock(prepare(0), self.device)]
        while _is_warming(warmup) and time.perf_counter() - began < self.max_seconds / 2:
            warmup.append(clock(prepare(len(warmup)), self.device))
        runs: list[float] = []
        least = min(MIN_REPEATS, repeats)
        while len(runs) < repeats and (len(runs) < least or time.perf_counter() - began < self.max_seconds):
            runs.append(clock(prepare(len(warmup) + len(runs)), self.device))
        return Timing.of(runs, len(warmup), graphed)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No garbage collection, the wanted number of threads; both are put back."""
        collects, threads = gc.isenabled(), torch.get_num_threads()
        gc.collect()
        gc.disable()
        torch.set_num_threads(self.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            if collects:
                gc.enable()


@cache
def _say_once(reason: str) -> None:
    log.warning("decoding is timed launch by launch, because it cannot be captured in a CUDA graph: %s", reason)


def _is_warming(runs_ms: list[float]) -> bool:
    """Three runs at least, then on as long as each is clearly the fastest yet."""
    if len(runs_ms) < MIN_WARMUP:
        return True
    return len(runs_ms) < MAX_WARMUP and runs_ms[-1] < STILL_WARMING * min(runs_ms[:-1])


def _wall_ms(run: Run, device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    began = time.perf_counter_ns()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return (time.perf_counter_ns() - began) / 1e6


def _cuda_ms(run: Run, device: torch.device) -> float:
    with torch.cuda.device(device):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end))


def measure_prefill(spec: ModelSpec, *, context: int, batch: int = 1, device: str = "cpu", repeats: int = 20) -> Timing:
    """`Bench.prefill` of a model built for this alone."""
    with Bench(spec, device) as bench:
        return bench.prefill(context=context, batch=batch, repeats=repeats)


def measure_decode(spec: ModelSpec, *, context: int, batch: int = 1, device: str = "cpu", repeats: int = 20) -> Timing:
    """`Bench.decode` of a model built for this alone."""
    with Bench(spec, device) as bench:
        return bench.decode(context=context, batch=batch, repeats=repeats)


def measure_train_step(
    spec: ModelSpec, *, context: int, batch: int = 1, device: str = "cpu", repeats: int = 20
) -> Timing:
    """`Bench.train_step` of a model built for this alone."""
    with Bench(spec, device) as bench:
        return bench.train_step(context=context, batch=batch, repeats=repeats)


def measure_state_bytes(spec: ModelSpec, *, context: int, batch: int = 1, device: str = "cpu") -> int:
    """`Bench.state_bytes` of a model built for this alone."""
    with Bench(spec, device) as bench:
        return bench.state_bytes(context=context, batch=batch)
