"""Floor 2: linears in 8-bit integers, weights and activations.

Read ``outliers``, ``linear``, ``embedding``; what computes is in ``cpu_kernels``.
"""
