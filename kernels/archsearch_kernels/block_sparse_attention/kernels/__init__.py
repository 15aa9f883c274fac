"""Device code of block-selected attention (MoBA, 2502.13189; NSA, 2502.11089), in the order of a training step:

    selection   k -> means of the blocks; q and means -> bits: which blocks each query reads
    readers     bits -> counts -> (running sums, by torch) ends -> pairs: the readers of each block, side by side
    forward     block by block: q, k, v, pairs -> parts and peaks; then query by query: these -> out and log_sums
    backward    out and its gradient -> delta; block by block: dk, dv and parts of dq; then query by query: dq
    step        one query over a cache: scores of the means, the best blocks, their attention, in shares if need be

`blocks` explains the words and the tables that all of them use.
"""
