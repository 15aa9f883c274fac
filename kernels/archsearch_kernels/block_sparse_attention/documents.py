"""Blocks of packed documents, each of which has its own from its first token: two tables for the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tables(seq_idx: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """tokens [B, 3, T] and windows [B, NB, 2] int32 of seq_idx [B, T], as `kernels/blocks.py` explains them.

    A document of many tokens ends in one block that is not full. Such ends share a window if they lie within the same
    block_size tokens of the row, counted from its beginning; one that crosses into the next has a window of its own. So
    no window has more than block_size tokens and there are at most two to each block_size: the size of the table needs
    no look at the documents.
    """
    B, T = seq_idx.shape
    c, at = block_size, torch.arange(T, device=seq_idx.device)
    opens = torch.where(_changes(seq_idx), at, 0).cummax(1).values  # [B, T]: first token of the document
    begin = at - (at - opens) % c  # of the token's block

    def reaches(t: Tensor) -> Tensor:
        """Whether token t >= begin exists and is of the same document."""
        return (t < T) & (opens.gather(1, t.clamp(max=T - 1)) == opens)

    full = reaches(begin + c - 1)
    cell = begin // c
    crosses = (begin % c > 0) & reaches((cell + 1) * c)
    new = _changes(2 * cell + crosses)
    n_full = (new & full).cumsum(1)  # up to and with the token's block
    n_ends = (new & ~full).cumsum(1)
    own = torch.where(full, n_full, n_full[:, -1:] + n_ends) - 1
    tokens = torch.stack([opens, own, n_full - full.long()], 1).int()

    n = 2 * -(-T // c)
    windows = torch.zeros(B, n + 1, 2, dtype=torch.int32, device=seq_idx.device)  # the last one is for the rest
    last = F.pad(new[:, 1:], (0, 1), value=True)
    for side, (marked, value) in enumerate(((new, at), (last, at + 1))):
        windows[..., side].scatter_(1, torch.where(marked, own, n), value.int().expand(B, T))
    return tokens, windows[:, :n].contiguous()


def _changes(x: Tensor) -> Tensor:
    """Where x [B, T] differs from the token before; the first one does."""
    return F.pad(x[:, 1:] != x[:, :-1], (1, 0), value=True)
