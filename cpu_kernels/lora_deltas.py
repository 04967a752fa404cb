"""LoRA deltas (Hu et al. 2021) of many adapters on the rows of one linear, in one call: y += factor * x @ A @ B."""

from __future__ import annotations

import torch

from cpu_kernels.c_kernel import CKernel
from cpu_kernels.native_kernel import Launcher

TASK_HEADER_SIZE, TASK_SIZE, ADAPTER_ENTRY_SIZE = 6, 6, 4
"""Int64 numbers of ``struct lora_tasks`` before its tasks, of ``struct lora_task``, and of ``struct lora_factors``.

The step's task table is one of the first with its tasks. A linear's adapter table has one of the last for each adapter;
its rank is 0 where the adapter does not change this linear. ``csrc/lora.h`` says what each number is. For tiles, A and
B are laid out as ``server/lora/native.py`` describes.
"""
LISTED_TASK_SIZE = 6
"""Numbers of a task in the list of a linear, which a product with tiles makes: first row, end, the addresses that its
tiles of x @ A would have for row 0 and B for output 0, bytes of B for sixteen outputs, steps of 32 ranks."""
TILE = 1024
"""Bytes of a tile: 16 rows of 64 bytes."""
ADD_DELTAS = CKernel("add_deltas", "x y y_stride inputs outputs tasks factors")


class AddDeltas:
    """Adds the LoRA deltas of a step's rows to one linear's output, for any mixture of adapters and ranks."""

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def __call__(self, x: torch.Tensor, y: torch.Tensor, tasks: int, factors: int) -> None:
        """``y += factor * x @ A @ B`` on the rows of each adapter.

        x is float32 [..., rows, in], y float32 [..., rows, out] whose rows are contiguous. ``tasks`` is the address of
        the task table, ``factors`` the address of the address of the linear's adapter table. A row's delta is the same
        to the bit in any batch.
        """
        x = x if x.is_contiguous() else x.contiguous()
        self._launch(
            ADD_DELTAS, torch.get_num_threads(), x.data_ptr(), y.data_ptr(), y.stride(-2), x.shape[-1], y.shape[-1],
            tasks, factors,
        )  # fmt: skip
