"""Next-token prediction: cross-entropy in fp32, reported in nats per token and in bits per byte of text.

Bits per byte do not depend on how the tokenizer cuts the text, so they compare across tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archsearch.errors import DataError
from archsearch.model import HybridLM
from archsearch.tasks import TensorBatch
from archsearch_kernels.dispatch import runs_kernel
from archsearch_kernels.linear_cross_entropy import linear_cross_entropy

LOGITS_AT_ONCE = 2**26  # logits held at a time: 256 MiB in fp32


class CausalLM:
    """Predict every token from those before it in its row (or in its document, where `seq_idx` is given)."""

    def loss(self, model: HybridLM, batch: TensorBatch) -> Tensor:
        """Mean cross-entropy in nats per token."""
        return self._nats(model, batch) / batch.targets.numel()

    def metrics(self, model: HybridLM, batches: Iterable[TensorBatch]) -> dict[str, float]:
        """`val_loss` (nats per token), `val_bpb` (bits per byte) and `val_tokens`, the number of targets.

        Raises DataError if there is no batch.
        """
        nats: list[Tensor] = []
        tokens = text_bytes = 0
        for batch in batches:
            nats.append(self._nats(model, batch).double())
            tokens += batch.targets.numel()
            text_bytes += batch.target_bytes
        if not nats:
            raise DataError("the corpus has no held-out text as long as the context")
        total = float(torch.stack(nats).sum())
        return {
            "val_loss": total / tokens,
            "val_bpb": total / math.log(2) / text_bytes,
            "val_tokens": float(tokens),
        }

    def _nats(self, model: HybridLM, batch: TensorBatch) -> Tensor:
        """Summed cross-entropy.

        The kernel never holds the logits. The reference takes a large vocabulary in pieces whose logits are computed
        again in the backward pass, so that no more than LOGITS_AT_ONCE are ever held.
        """
        hidden = model.hidden(batch.inputs, batch.seq_idx).flatten(0, 1)  # [B T, D]
        weight, targets = model.head.weight, batch.targets.flatten()
        rows = max(1, LOGITS_AT_ONCE // model.spec.vocab_size)
        if len(targets) <= rows or runs_kernel("linear_cross_entropy", hidden):
            return linear_cross_entropy(hidden, weight, targets, logit_scale=model.logit_scale, reduction="sum")
        pieces = [
            checkpoint(
                linear_cross_entropy,
                hidden[i : i + rows],
                weight,
                targets[i : i + rows],
                logit_scale=model.logit_scale,
                reduction="sum",
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for i in range(0, len(targets), rows)
        ]
        return torch.stack(pieces).sum()
