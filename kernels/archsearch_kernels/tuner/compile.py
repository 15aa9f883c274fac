"""Compiles recorded launches in a pool of processes, for a GPU that need not be there, and reads what they cost.

A process of the pool (`python -m archsearch_kernels.tuner.compile`, JSON lines in and out) does not use Triton's
interpreter, so a launch that was interpreted in a test can be compiled. Arguments go through Triton's own
specialisation: what the pool compiles for the GPU at hand is found in Triton's cache by the launch that comes after.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from archsearch_kernels.assembler import lost_registers, prefer_a_sound_one
from archsearch_kernels.launch import Config, Launch

HOPPER = 90
COMPILE_SECONDS = 120.0


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of spills a thread, bytes of shared memory a program."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str | None = None


def request(launch: Launch, config: Config, capability: int = HOPPER) -> dict[str, Any]:
    """A launch in a configuration as plain data, for a compiling process."""
    arguments: dict[str, Any] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = {"pointer": str(value.dtype)[6:], "aligned": value.data_ptr() % 16 == 0}
        else:
            arguments[name] = value
    return {
        "module": launch.kernel.python.__module__,
        "kernel": launch.kernel.name,
        "arguments": arguments,
        "config": dict(config),
        "capability": capability,
    }


def claim(folder: Path, asking: dict[str, Any]) -> bool:
    """Whether nobody who shares the folder has asked for this before."""
    try:
        _place(folder, asking).open("x").close()
    except FileExistsError:
        return False
    return True


def keep(folder: Path, asking: dict[str, Any], answer: Resources) -> None:
    """Leave an answer for those who share the folder."""
    place = _place(folder, asking)
    beside = place.with_suffix(".part")
    beside.write_text(json.dumps(asdict(answer)))
    beside.replace(place)


def kept(folder: Path | None, asking: dict[str, Any]) -> Resources | None:
    """The answer that somebody left; None: nobody did, or has yet."""
    if folder is None or not (place := _place(folder, asking)).exists():
        return None
    text = place.read_text()
    return Resources(**json.loads(text)) if text else None


def _place(folder: Path, asking: dict[str, Any]) -> Path:
    return folder / hashlib.sha256(json.dumps(asking, sort_keys=True).encode()).hexdigest()


class CompilePool:
    """Processes that compile; use it as a context. `workers`: how many, by default one per core.

    answers: a folder in which others `keep` what they have compiled.
    """

    answers: Path | None = None

    def __init__(self, workers: int | None = None) -> None:
        self._idle: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._idle:
            process.kill()
            process.communicate()

    def compile(self, requests: Sequence[dict[str, Any]]) -> list[Resources]:
        """Compile all; a request that fails, hangs or kills its process is an answer with `error`."""
        return list(self._threads.map(self._one, requests))

    def _one(self, asked: dict[str, Any]) -> Resources:
        if (known := kept(self.answers, asked)) is not None:
            return known
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(COMPILE_SECONDS, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if not line:
            process.kill()
            _, problem = process.communicate()
            return Resources(error=f"the compiler process ended: {problem.strip()[-300:]}")
        with self._lock:
            self._idle.append(process)
        return Resources(**json.loads(line))


def compile_all(requests: Sequence[dict[str, Any]]) -> list[Resources]:
    """Compile requests in a pool made for them."""
    with CompilePool(min(len(requests), len(os.sched_getaffinity(0))) or 1) as pool:
        return pool.compile(requests)


def _start() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-m", "archsearch_kernels.tuner.compile"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )


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
    jitted = getattr(fn, "fn", fn)
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
    registers, spills, sass = _disassembled(compiled.asm["cubin"], with_code="wgmma" in compiled.asm["ptx"])
    lost = lost_registers(sass)
    error = f"ptxas lost a register that is read at {lost[0]}" if lost else None
    return Resources(registers, spills, int(compiled.metadata.shared), error)


def _disassembled(cubin: bytes, with_code: bool) -> tuple[int, int, str]:
    """Registers, bytes of stack (in a kernel without local arrays, its spills), and its instructions if asked for."""
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
    answers, sys.stdout = sys.stdout, sys.stderr  # what a compiler prints is no answer
    for line in sys.stdin:
        try:
            answer = compile_one(json.loads(line))
        except Exception as error:  # an answer like any other: the configuration does not compile
            answer = Resources(error=f"{type(error).__name__}: {str(error)[:300]}")
        print(json.dumps(asdict(answer)), flush=True, file=answers)


if __name__ == "__main__":
    main()
