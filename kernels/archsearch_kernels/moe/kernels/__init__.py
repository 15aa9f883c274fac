"""Device code of the mixture of experts, in the order in which a batch passes through it:

    routing     logits -> the experts chosen for each token, and their weights
    sorting     chosen -> the choices in the order of their experts: order, place, offsets
    rows        tokens copied into that order (where torch makes the products, which wants them so)
    products    rows times gate and up of their experts, joined by SwiGLU; then times down
    rows        each token's rows, weighed and summed

Backward goes from the last to the first: rows of the gradient, products with the transposed matrices, the gradient of
SwiGLU row by row, the gradients of the matrices, the sum of each token's rows, the gradient of the logits.
"""
