"""Compiles recorded launches in a pool of processes, for a GPU that need not be there, and reads what they cost.

A process of the pool (`python -m archsearch_kernels.tuner.compile`, JSON lines in and out) does not use Triton's
interpreter, so a launch that was interpreted in a test can be compiled. Arguments go through Triton's own
specialisation: what the pool compiles for the GPU at hand is found in Triton's cache by the launch that comes after.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from archsearch_kernels.assembler import is_sound, lost_registers, prefer_a_sound_one
from archsearch_kernels.launch import Config, Launch

HOPPER = 90
COMPILE_SECONDS = 120.0
NICE = 10  # compiling processes give way to the one that times


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of spills a thread, bytes of shared memory a program."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str | None = None


def request(launch: Launch, config: Config, capability: int = HOPPER, *, read_code: bool = True) -> dict[str, Any]:
    """A launch in a configuration as plain data, for a compiling process.

    Launches for which Triton compiles the same code give equal requests: one number stands for all that it does not
    tell apart. read_code: look for lost registers even in the code of an assembler that is known to be sound.
    """
    arguments: dict[str, Any] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = {"pointer": str(value.dtype)[6:], "aligned": value.data_ptr() % 16 == 0}
        elif name in launch.kernel.constexprs:
            arguments[name] = value
        else:
            arguments[name] = _alike(value, name not in launch.kernel.unspecialized)
    return {
        "module": launch.kernel.python.__module__,
        "kernel": launch.kernel.name,
        "arguments": arguments,
        "config": dict(config),
        "capability": capability,
        "read_code": read_code,
    }


def _alike(value: Any, specialized: bool) -> Any:
    """The number that stands for all that give the same code (see `Kernel._exactly`)."""
    if type(value) is float:
        return 0.5
    if type(value) is not int or value >= 2**63:
        return value
    wide = 0 if -(2**31) <= value < 2**31 else 2**31
    if not specialized:
        return wide + 16
    return 1 if value == 1 else wide + (16 if value % 16 == 0 else 17)


@dataclass(order=True)
class _Task:
    """Something to be compiled: the lowest rank first, of equal ranks what was asked for first."""

    rank: int
    number: int
    asked: dict[str, Any] = field(compare=False)
    answer: Future[Resources] = field(compare=False)


class CompilePool:
    """Processes that compile; use it as a context. `workers`: how many, by default one per core.

    What was asked for before is not compiled again.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._tasks: list[_Task] = []  # a heap; what has become more urgent is in it twice
        self._asked: dict[str, _Task] = {}
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._processes: set[_Process] = set()
        n = workers or len(os.sched_getaffinity(0))
        self._threads = [threading.Thread(target=self._serve) for _ in range(n)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            for task in self._asked.values():
                task.answer.cancel()
            for process in self._processes:  # what they are at is of no use any more
                process.process.kill()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def compile(self, requests: Sequence[dict[str, Any]]) -> list[Resources]:
        """Compile all; a request that fails, hangs or kills its process is an answer with `error`."""
        return [answer.result() for answer in self.submit(requests)]

    def submit(self, requests: Sequence[dict[str, Any]], rank: int = 0) -> list[Future[Resources]]:
        """As `compile`, without waiting. rank: the lowest is compiled first, whoever else waits."""
        with self._changed:
            answers = [self._put(asked, rank) for asked in requests]
            self._changed.notify_all()
        return answers

    def _put(self, asked: dict[str, Any], rank: int) -> Future[Resources]:
        key = json.dumps(asked, sort_keys=True)
        task = self._asked.get(key)
        if task is None or rank < task.rank:
            answer: Future[Resources] = Future() if task is None else task.answer
            task = self._asked[key] = _Task(rank, next(self._count), asked, answer)
            heappush(self._tasks, task)
        return task.answer

    def _serve(self) -> None:
        """A thread: one process, replaced when it dies, and one task after another."""
        process: _Process | None = self._start()
        while (task := self._next()) is not None:
            process = process or self._start()
            found = process.compile(task.asked)
            if process.process.returncode is not None:
                process = None
            task.answer.set_result(found)
        if process is not None:
            process.close()

    def _start(self) -> _Process:
        process = _Process()
        with self._changed:
            self._processes.add(process)
            if self._closed:
                process.process.kill()
        return process

    def _next(self) -> _Task | None:
        """The next task; waits for one. None: the pool is closed."""
        with self._changed:
            while not self._closed:
                while self._tasks:
                    task = heappop(self._tasks)
                    if not task.answer.running() and not task.answer.done():
                        task.answer.set_running_or_notify_cancel()
                        return task
                self._changed.wait()
        return None


class _Process:
    """A compiling process."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (read when the process has died)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "archsearch_kernels.tuner.compile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
        )

    def compile(self, asked: dict[str, Any]) -> Resources:
        """Its answer, or what it said when it died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watch = threading.Timer(COMPILE_SECONDS, self.process.kill)
        watch.start()
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if line:
            return Resources(**json.loads(line))
        return Resources(error=f"the compiler process ended: {self.close()[-300:]}")

    def close(self) -> str:
        """Kill it; what it has said besides answers."""
        self.process.kill()
        self.process.communicate()
        with self.log:
            self.log.seek(0)
            return self.log.read().strip()


class _Pointer:
    """What Triton's specialisation looks at in a tensor."""

    def __init__(self, dtype: str, aligned: bool) -> None:
        self.dtype = getattr(torch, dtype)
        self.address = 0 if aligned else 8

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 0


def compile_one(request: dict[str, Any]) -> Resources:
    """Compile in this process, which must not interpret Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    prefer_a_sound_one(divmod(request["capability"], 10))  # as the launches of that device do
    fn = getattr(importlib.import_module(request["module"]), request["kernel"])
    jitted = fn.fn
    fn.settle()
    arguments = {
        name: _Pointer(value["pointer"], value["aligned"]) if isinstance(value, dict) else value
        for name, value in request["arguments"].items()
    }
    target = GPUTarget("cuda", request["capability"], 32)
    backend = make_backend(target)
    given = {**arguments, **request["config"], "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = create_function_from_signature(jitted.signature, jitted.params, backend)(**given)
    options, signature, constexprs, attributes = jitted._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(jitted, signature, constexprs, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    with_code = "wgmma" in compiled.asm["ptx"] and (request["read_code"] or not is_sound())
    registers, spills, sass = _disassembled(compiled.asm["cubin"], with_code)
    lost = lost_registers(sass)
    error = f"ptxas lost a register that is read at {lost[0]}" if lost else None
    return Resources(registers, spills, int(compiled.metadata.shared), error)


def _disassembled(cubin: bytes, with_code: bool) -> tuple[int, int, str]:
    """Registers, bytes of stack (in a kernel without local arrays, its spills), and its instructions if asked for.

    The instructions take 0.7 s of a core, as much as the compilation.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        code = ""
        if with_code:
            code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2]), code


def main() -> None:
    """Answer the requests on stdin."""
    import triton  # noqa: F401  (before the first request comes)

    os.nice(NICE)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a compiler prints is no answer
    for line in sys.stdin:
        try:
            answer = compile_one(json.loads(line))
        except Exception as error:  # an answer like any other: the configuration does not compile
            answer = Resources(error=f"{type(error).__name__}: {str(error)[:300]}")
        print(json.dumps(asdict(answer)), flush=True, file=answers)


if __name__ == "__main__":
    main()
