"""What ``test_int8`` asks of FBGEMM without VNNI, in a process of its own: FBGEMM reads its variable once."""

from __future__ import annotations

from unittest.mock import patch

import torch

from server.int8.kernels import FbgemmKernel, weight_levels
from tests.model.int8_bases import assert_micro_understands
from tests.model.test_int8 import assert_independent, kernel_of, test_sums_over_the_largest_numbers_are_exact


def main() -> None:
    """Prints the levels of weights; fails where a row depends on others, or micro understands less than it may."""
    torch.set_num_threads(1)
    print(weight_levels(FbgemmKernel))
    test_sums_over_the_largest_numbers_are_exact(FbgemmKernel, 127)
    assert_independent(kernel_of(FbgemmKernel))
    with patch("server.model.loader.choose_kernel", lambda: FbgemmKernel):
        assert_micro_understands()


if __name__ == "__main__":
    main()
