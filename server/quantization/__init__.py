"""Floor 2: int8 quantization of weights and activations.

Read ``int8_modules``, ``int8_experts``, ``outliers``; the kernels are in ``cpu_kernels``.
"""
