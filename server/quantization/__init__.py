"""Floor 2: linears in 8-bit integers, weights and activations.

Read ``rows``, ``kernels``, ``outliers``, ``linear``, ``embedding``.
"""
