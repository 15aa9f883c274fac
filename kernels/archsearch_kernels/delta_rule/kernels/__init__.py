"""Device code of the delta rule (2406.06484, 2412.06464), in the order of a training step:

    forward     of all chunks at once: k, q, beta, g -> what a chunk needs of itself (Y by `inverse`, P, since, until);
                then chunk after chunk: these, v and the state -> o and the next state
    backward    chunk after chunk from the last: dv and the gradient of each state; then of all chunks at once: dq, dk
                and the gradients of beta and g
    step        one token: a state that is read and written once

`chunks` is what all of them share: products, decays and documents of a chunk. The formulas stand in `forward` and
`backward`.
"""
