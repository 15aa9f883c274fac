"""Does one learning rate serve every width? Held-out loss over a grid of rates at several widths, as a table.

    OMP_NUM_THREADS=1 python benchmarks/width_transfer.py
    OMP_NUM_THREADS=1 python benchmarks/width_transfer.py --without --widths 64 128
    OMP_NUM_THREADS=1 python benchmarks/width_transfer.py --mixer '{"kind": "mamba2", "head_dim": 32}' --widths 64

Byte-level models on the built-in corpus (sources of the standard library). `--without` makes every width its own
base, so that the rule of docs/design/0003-width.md does nothing: one rate for all parameters, logits not scaled.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform

import torch

import archsearch.model
from archsearch.architecture import Block, ModelSpec, parse_ffn, parse_mixer
from archsearch.data import Corpus, open_corpus
from archsearch.errors import NonFiniteError
from archsearch.settings import Task, Train
from archsearch.train import evaluate, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--mixer", type=json.loads, default={"kind": "attention", "head_dim": 32})
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without", action="store_true", help="without the rule")
    options = parser.parse_args()
    corpus = open_corpus(Task())
    rule = "without" if options.without else "with"
    print(
        f"{rule} the rule: {options.mixer['kind']}, {options.blocks} blocks, context {options.context}, "
        f"{options.steps} steps of {options.batch_tokens} bytes, seed {options.seed}, corpus {corpus.sha256[:12]}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.device}, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads\n"
    )
    print("| d_model |" + "".join(f" {lr:g} |" for lr in options.lrs) + " best |")
    print("|" + " --- |" * (len(options.lrs) + 2))
    for width in options.widths:
        print(f"| {width} |", end="", flush=True)
        losses = {}
        for lr in options.lrs:
            losses[lr] = held_out_loss(width, lr, corpus, options)
            print(f" {losses[lr]:.3f} |", end="", flush=True)
        print(f" {min(losses, key=losses.__getitem__):g} |", flush=True)


def held_out_loss(width: int, lr: float, corpus: Corpus, options: argparse.Namespace) -> float:
    """Nats per byte after training; infinite if it diverged."""
    block = Block(parse_mixer(options.mixer), parse_ffn({"kind": "swiglu"}))
    spec = ModelSpec(width, options.context, corpus.vocab_size, (block,) * options.blocks)
    settings = Train(
        tokens=options.steps * options.batch_tokens,
        batch_tokens=options.batch_tokens,
        lr=lr,
        val_tokens=65_536,
        seed=options.seed,
    )
    if options.without:
        archsearch.model.BASE_WIDTH = width
    model = archsearch.model.build_model(spec, options.seed, options.device)
    try:
        train(model, spec, corpus, settings, device=options.device)
    except NonFiniteError:
        return math.inf
    return evaluate(model, spec, corpus, settings, device=options.device)["val_loss"]


if __name__ == "__main__":
    main()
