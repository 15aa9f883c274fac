"""The selective scan of Mamba: training, and the decode step."""

from __future__ import annotations

from functools import partial

import torch
from case import Case, Inputs

from archsearch_kernels.selective_scan import selective_scan, selective_scan_step


def sequences(B: int, T: int, D: int, N: int) -> Inputs:
    """As the mixer makes them: step sizes and rates in float32, all else in bfloat16."""
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dt = (0.1 * torch.rand(B, T, D, device="cuda")).requires_grad_()
    a = (-torch.arange(1.0, N + 1, device="cuda")).repeat(D, 1).requires_grad_()
    b, c = (torch.randn(B, T, N, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    return {"x": x, "dt": dt, "a": a, "b": b, "c": c}


def tokens(B: int, D: int, N: int) -> Inputs:
    """One token of every sequence and the states."""
    made = {name: x.detach() for name, x in sequences(B, 1, D, N).items()}
    one = {name: x if name == "a" else x[:, 0].contiguous() for name, x in made.items()}
    return {**one, "state": torch.randn(B, N, D, device="cuda")}


def training(B: int, T: int, D: int = 4096, N: int = 16) -> Case:
    n = B * T
    return Case(
        op="selective_scan",
        shape=f"B{B} T{T} D{D} N{N}",
        inputs=partial(sequences, B, T, D, N),
        run=selective_scan,
        reference=partial(selective_scan, implementation="reference"),
        small=partial(sequences, 1, 321, 96, N),
        flops=(n * D * 4.0 * N, n * D * 14.0 * N),
        bytes=(n * (8.0 * D + 4 * N), n * (22.0 * D + 12 * N)),
    )


def decoding(B: int, D: int = 4096, N: int = 16) -> Case:
    return Case(
        op="selective_scan_step",
        shape=f"B{B} D{D} N{N}",
        inputs=partial(tokens, B, D, N),
        run=partial(selective_scan_step, inplace=True),
        reference=lambda state, **given: selective_scan_step(**given, state=state.clone(), implementation="reference"),
        small=partial(tokens, 2, 96, N),
        flops=(B * D * 4.0 * N, 0.0),
        bytes=(B * D * (8.0 * N + 8) + 4.0 * D * N, 0.0),
        backward=False,
        graphed=True,
        against="floor",
        goal=2.0,
    )


CASES: list[Case] = [training(2, 8192), training(8, 2048), decoding(1), decoding(64)]
