"""What the tests of Triton kernels share: the device, inputs, distances, and the compiler for Hopper.

On a machine with a GPU the kernels run there; elsewhere in Triton's interpreter (see triton_interpreter).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from archsearch_kernels.launch import Launch
from archsearch_kernels.tuner.compile import CompilePool, Resources, request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
LENGTHS = (1, 63, 100, 257)  # none a multiple of any block
MAX_SHARED = 232_448 - 1_024  # bytes a program may have on Hopper, less what the driver keeps
# root-mean-square error relative to the reference's root mean square; a GPU computes float32 products in tf32
TOLERANCE = {torch.float32: 1e-4 if DEVICE == "cpu" else 2e-3, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device, the same at every call."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return numbers.to(DEVICE, dtype)


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected; NaN is infinitely far."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    apart = (got.detach().double().cpu() - expected.detach().double().cpu()).square().mean().sqrt()
    size = expected.detach().double().cpu().square().mean().sqrt().clamp(min=1e-6)
    return (apart / size).nan_to_num(float("inf")).item()


def outputs_and_gradients(run: Callable[..., Any], inputs: dict[str, Any], seed: int = 7) -> dict[str, Tensor]:
    """What `run(**inputs)` returns and the gradients of every floating-point input, under one random cotangent each."""
    given = {
        name: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    out = run(**given)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor)]
    torch.autograd.backward(outs, [randn(*o.shape, seed=seed + i).to(o.dtype) for i, o in enumerate(outs)])
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.requires_grad:
            assert value.grad is not None, f"no gradient reaches {name}"
            assert value.grad.dtype == value.dtype
            found[f"gradient of {name}"] = value.grad
    return found


def assert_same(
    run: Callable[..., Any], reference: Callable[..., Any], inputs: dict[str, Any], tolerance: float | None = None
) -> None:
    """Outputs and gradients of `run` against those of `reference` on the same numbers in float64 (or float32)."""
    dtype = next(v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    with poisoned():
        got = outputs_and_gradients(run, inputs)
    expected = outputs_and_gradients(reference, wide)
    assert got.keys() == expected.keys()
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    wrong = {n: e for n in got if (e := error(got[n], expected[n])) > limit}
    assert not wrong, f"beyond {limit}: {wrong}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is not written before it is read holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = before


_pools = ExitStack()


@cache
def compilers() -> CompilePool:
    """Compiling processes for all tests of this one: each takes longer to start than to compile a kernel or two."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return _pools.enter_context(CompilePool(max(1, cores)))


def end_compilers() -> None:
    _pools.close()
    compilers.cache_clear()


def compiled(launches: Sequence[Launch], configs: int = 1) -> list[tuple[str, dict[str, int], Resources]]:
    """Every recorded launch, once a key, compiled for Hopper in its first `configs` configurations."""
    distinct = {launch.key: launch for launch in launches}
    asked = [(x, c) for x in distinct.values() for c in x.kernel.configs(x.arguments)[:configs]]
    answers = compilers().compile([request(launch, config) for launch, config in asked])
    return [(launch.kernel.name, dict(config), r) for (launch, config), r in zip(asked, answers, strict=True)]


def assert_fits_hopper(launches: Sequence[Launch], configs: int = 1, spills: int = 0) -> None:
    """The default configuration of every kernel compiles for sm_90a, does not spill and fits the shared memory."""
    for name, config, r in compiled(launches, configs):
        assert r.error is None, f"{name} {config}: {r.error}"
        assert r.spills <= spills, f"{name} {config} spills {r.spills} bytes"
        assert r.shared <= MAX_SHARED, f"{name} {config} wants {r.shared} bytes of shared memory"
