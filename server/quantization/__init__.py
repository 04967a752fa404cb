"""Floor 2: linears in 8-bit integers, weights and activations.

Read ``int8_modules``, ``outliers``; what computes is in ``cpu_kernels``.
"""
