"""Device code of linear attention with one decay per head (chunkwise form, 2312.06635 and 2405.21060), in the order of
a training step:

    forward     chunk after chunk: k, v -> the state that each finds; then of all chunks at once: these, q, k, v -> o
    backward    chunk after chunk from the last, by the kernel of `forward`: q, do -> the gradient of the state that
                each leaves; then of all chunks at once: dq, and what reading owes to the decays; then dk, dv and dg
    step        one token: a state that is read and written once

`decays` is what all of them do with log decays.
"""
