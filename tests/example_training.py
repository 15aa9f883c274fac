"""Small trainings for tests: a corpus in memory, a few architectures, and a script that continues checkpoints.

    python example_training.py DEVICE IN OUT [IN OUT ...]

loads each checkpoint IN, trains to the end of its budget and writes OUT.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from archsearch.architecture import Block, ModelSpec, Trunk, parse_ffn, parse_mixer
from archsearch.data import Batch
from archsearch.model import HybridLM, build_model
from archsearch.settings import Train

VOCAB_SIZE = 32


class ExampleCorpus:
    """Text of a random automaton: each symbol is followed by one of three, mostly by the first of them."""

    def __init__(self, vocab_size: int = VOCAB_SIZE, n_tokens: int = 20_000, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        follow = draw.integers(0, vocab_size, (vocab_size, 4, 3)).tolist()
        tokens = [0, 1]
        for choice in draw.choice(3, n_tokens, p=(0.8, 0.15, 0.05)).tolist():
            tokens.append(follow[tokens[-1]][tokens[-2] % 4][choice])
        self.tokens = np.array(tokens, dtype=np.int64)
        self.sha256 = hashlib.sha256(self.tokens.tobytes()).hexdigest()
        self.n_val = n_tokens // 10

    def train_batch(self, step: int, *, batch_size: int, context: int, seed: int) -> Batch:
        starts = np.random.default_rng((seed, step)).integers(0, len(self.tokens) - self.n_val - context, batch_size)
        return self._windows(starts, context)

    def val_batches(self, *, batch_size: int, context: int, max_tokens: int) -> Iterator[Batch]:
        n_windows = min(self.n_val, max_tokens) // context
        starts = len(self.tokens) - self.n_val - 1 + context * np.arange(n_windows)
        for i in range(0, n_windows, batch_size):
            yield self._windows(starts[i : i + batch_size], context)

    def _windows(self, starts: np.ndarray, context: int) -> Batch:
        rows = self.tokens[starts[:, None] + np.arange(context + 1)]
        inputs, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        return Batch(inputs, targets, target_bytes=2 * targets.size, seq_idx=None)


def example_spec(
    *mixers: dict[str, Any],
    ffn: dict[str, Any] | None = None,
    d_model: int = 32,
    context: int = 16,
    tie_embeddings: bool = True,
    shared_ffn: bool = False,
) -> ModelSpec:
    """One block for each mixer (attention if none is given); `shared_ffn`: all use the first one's."""
    blocks = tuple(
        Block(
            parse_mixer(mixer),
            parse_ffn(ffn or {"kind": "swiglu", "expand": 2}),
            ffn_weights_from=0 if shared_ffn and i else None,
        )
        for i, mixer in enumerate(mixers or ({"kind": "attention", "head_dim": 16},) * 2)
    )
    return ModelSpec(d_model, context, VOCAB_SIZE, blocks, Trunk(tie_embeddings=tie_embeddings))


def example_model(spec: ModelSpec | None = None, seed: int = 0, device: str = "cpu") -> HybridLM:
    """A fresh model."""
    return build_model(spec or example_spec(), seed, device)


def example_settings(**changes: Any) -> Train:
    """Twelve steps of four rows of 16 tokens."""
    return Train.model_validate(
        {"tokens": 12 * 64, "batch_tokens": 64, "val_tokens": 256, "lr": 4e-3, "warmup": 0.2, "decay": 0.5} | changes
    )


def _continue(device: str, came_from: Path, goes_to: Path) -> None:
    from archsearch import checkpoint as checkpoints
    from archsearch.train import train

    stopped = checkpoints.load(came_from, device)
    model = example_model(stopped.spec, seed=1, device=device)  # another seed: all must come from the file
    result = train(model, stopped.spec, ExampleCorpus(), stopped.settings, device=device, resume=stopped)
    checkpoints.save(goes_to, result.checkpoint)


if __name__ == "__main__":
    paths = iter(sys.argv[2:])
    for path in paths:
        _continue(sys.argv[1], Path(path), Path(next(paths)))
