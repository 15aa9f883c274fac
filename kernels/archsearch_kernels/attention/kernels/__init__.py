"""Device code of causal softmax attention (FlashAttention-2, 2307.08691):

    forward     q, k, v -> o and the log-sum-exp of every row
    backward    o and its gradient -> delta and dq; then dk, dv; then the gradient of the sink
    step        one query over a cache, in splits of the keys, which are then weighed together

`tiles` loads and stores them, `visible` says which keys a row sees and which rows see a key.

Rows are queries: row i of T stands at position i + S - T among the S keys. In a loop over tiles only those at the edge
of the window and on the diagonal take the branch with masks: loops of their own would hand the accumulators over, and
ptxas then runs every wgmma alone (C7515). Scores are kept in units of log 2: `scale2` is the softmax's scale times
log2(e), so exp2 needs no further product.
"""
