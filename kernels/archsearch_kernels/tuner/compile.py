"""Compiles recorded launches for a GPU that need not be there, and reads what they cost: registers, spills, shared memory.

Runs in processes of its own (`python -m archsearch_kernels.tuner.compile < requests > answers`, a JSON line each),
without Triton's interpreter, so the same process that interprets a kernel in a test can have it compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from archsearch_kernels.launch import LAUNCH_OPTIONS, Config, Launch

HOPPER = 90
POINTERS = {
    "bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "float64": "*fp64", "int64": "*i64", "int32": "*i32",
    "int16": "*i16", "int8": "*i8", "uint8": "*u8", "bool": "*i1", "float8_e4m3fn": "*fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of spills a thread, bytes of shared memory a program."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str | None = None


def request(launch: Launch, config: Config, capability: int = HOPPER) -> dict[str, Any]:
    """A launch in a configuration as plain data, for a compiling process."""
    kernel = launch.kernel
    arguments: dict[str, Any] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = {"pointer": str(value.dtype)[6:], "aligned": value.data_ptr() % 16 == 0}
        else:
            arguments[name] = value
    return {
        "module": kernel.python.__module__,
        "kernel": kernel.name,
        "arguments": arguments,
        "config": dict(config),
        "capability": capability,
    }


def compile_all(requests: Sequence[dict[str, Any]], workers: int | None = None) -> list[Resources]:
    """Compile every request in a pool of processes; a request that fails is an answer with `error`."""
    workers = min(len(requests), workers or len(os.sched_getaffinity(0))) or 1
    shares = [list(range(i, len(requests), workers)) for i in range(workers)]
    answers: list[Resources] = [Resources(error="not compiled")] * len(requests)

    def serve(share: list[int]) -> None:
        for i, answer in zip(share, _process([requests[i] for i in share]), strict=True):
            answers[i] = answer

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(serve, shares))
    return answers


def _process(requests: list[dict[str, Any]]) -> list[Resources]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "archsearch_kernels.tuner.compile"],
        input="\n".join(map(json.dumps, requests)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    answers = [Resources(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    crashed = Resources(error=f"the compiler process ended: {done.stderr.strip()[-500:]}")
    return answers + [crashed] * (len(requests) - len(answers))


def compile_one(request: dict[str, Any]) -> Resources:
    """Compile in this process, which must not interpret Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(request["module"]), request["kernel"])
    jitted = getattr(fn, "fn", fn)
    constexpr = {p.name for p in jitted.params if p.is_constexpr}
    config = request["config"]
    options = {name: config[name] for name in LAUNCH_OPTIONS if name in config}
    values = {**request["arguments"], **{n: v for n, v in config.items() if n not in options}}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(jitted.arg_names):
        value = values.get(name)
        if name in constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, dict):
            signature[name] = POINTERS[value["pointer"]]
            if value["aligned"]:
                attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in _unspecialised(jitted):
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=jitted, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", request["capability"], 32), options=options)
    return Resources(*_usage(compiled.asm["cubin"]), shared=int(compiled.metadata.shared))


def _unspecialised(jitted: Any) -> set[str]:
    return {p.name for p in jitted.params if p.do_not_specialize}


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack: in a kernel without local arrays, its spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])


def main() -> None:
    """Answer the requests on stdin."""
    for line in sys.stdin:
        try:
            answer = compile_one(json.loads(line))
        except Exception as error:  # an answer like any other: the configuration does not compile
            answer = Resources(error=f"{type(error).__name__}: {str(error)[:300]}")
        print(json.dumps(asdict(answer)), flush=True)


if __name__ == "__main__":
    main()
