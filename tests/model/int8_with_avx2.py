"""What ``test_int8`` asks of a process that may use AVX2 alone: FBGEMM, torch and Numba read their variables once."""

from __future__ import annotations

import sys

import numpy as np
import torch
from numba import njit

from cpu_kernels.intrinsics import has_features
from cpu_kernels.kernels import Kernels, choose_linear, native_linears
from cpu_kernels.linear import FbgemmLinear
from server.model.device import choose_kv_dtype
from tests.model.int8_bases import assert_micro_understands
from tests.model.test_int8 import assert_independent, linear_of, test_sums_over_the_largest_numbers_are_exact


@njit(fastmath=True)
def _dot(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


def assert_nothing_above_avx2_is_used() -> None:
    """Neither by torch nor by what Numba compiles."""
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert choose_kv_dtype(torch.float32) == torch.float32, "this CPU's bfloat16 belongs to AVX-512 or AMX"
    assert not any(has_features(name) for name in ("avx512f", "avx512vnni", "avxvnni", "amx-tile"))
    assert not native_linears() and choose_linear() == FbgemmLinear.name
    numbers = np.ones(64, dtype=np.float32)
    assert _dot(numbers, numbers) == 64.0
    (code,) = _dot.inspect_asm().values()
    assert "ymm" in code and "zmm" not in code


def main() -> None:
    """Prints the largest integer of weights; fails where a row depends on others, or micro understands too little."""
    torch.set_num_threads(1)
    assert_nothing_above_avx2_is_used()
    fbgemm = Kernels(linear=FbgemmLinear.name)
    print(fbgemm.qmax)
    test_sums_over_the_largest_numbers_are_exact(fbgemm, 127)
    assert_independent(linear_of(fbgemm))
    if "--with-micro" in sys.argv:
        assert_micro_understands()


if __name__ == "__main__":
    main()
