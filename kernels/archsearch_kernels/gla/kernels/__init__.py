"""Device code of gated linear attention (2312.06635) over chunks of 64 tokens, in the order of a training step:

    forward     of all chunks at once: q, k, g -> scores of a chunk's pairs, q and k decayed to its start and end, its
                own decay; chunk after chunk: the state that each finds; then of all at once: scores, v, q, states -> o
    backward    the gradient of every state (`gla_states` walked backwards) and of v (`gla_outputs` with the scores
                transposed); of all chunks at once: gradients of the scores, then of q, k and g
    step        one token: a state that is read and written once

`decays` is what all of them do with the decays between the tokens of a chunk, for every feature its own.
"""
