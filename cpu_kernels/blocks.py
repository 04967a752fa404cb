"""The memory layout of int8 weights and their constants, shared by all GEMM kernels.

A weight is int8 [blocks, inputs / 4, 32, 4], inputs padded with zeros to a multiple of 64: instructions that multiply
bytes (VPDPBUSD, TDPBUSD) take groups of four inputs for each of their outputs. A block holds sixteen outputs of the
first half of the outputs and sixteen of the second, each half padded to a multiple of 16. Where the first half gates
the second, both sides of a gated unit are in one block, and only their product is written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK_OUTPUTS, HALF_BLOCK = 32, 16
"""Outputs of a block of weights (two tiles, two vectors of 16 numbers), and of each half of it."""
TILE_ROWS, TILE_BYTES = 16, 64
BF16_STEP = 32
"""bfloat16 numbers in a row of a tile: the length over which one product of such tiles sums."""
PANEL_ROWS = 2 * TILE_ROWS
"""Rows of a panel, the rows that are multiplied together where there are many; buffers are padded to it."""
FEW_ROWS = 32
"""Up to so many rows, the time of a GEMM is that of reading the weights from memory."""
UNSPLIT_STEPS = 32
"""Up to so many steps of 64 inputs a block is multiplied at once; more are split into slabs, with sums kept between."""
CHUNK_ROWS = 512
"""Rows of a chunk; each chunk of a prompt reads all weights."""
NO_GATING, BY_SILU, BY_GELU = 0, 1, 2


def sums_size(num_rows: int, width: int, num_blocks: int) -> int:
    """Bytes for the sums between slabs, of ``num_rows`` rows and ``width`` padded inputs; 0 where there is one slab."""
    unsplit = num_rows <= FEW_ROWS or width <= TILE_BYTES * UNSPLIT_STEPS
    return 0 if unsplit else 4 * BLOCK_OUTPUTS * num_blocks * min(CHUNK_ROWS, padded(num_rows, PANEL_ROWS))


def padded(number: int, multiple: int) -> int:
    """``number`` rounded up to a multiple of ``multiple``."""
    return -(-number // multiple) * multiple


def in_blocks(integers: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] -> [blocks, in / 4, 32, 4]."""
    num_outputs, num_inputs = integers.shape
    blocks, width = padded(num_outputs, BLOCK_OUTPUTS) // BLOCK_OUTPUTS, padded(num_inputs, TILE_BYTES)
    packed = torch.empty(blocks, width // 4, BLOCK_OUTPUTS, 4, dtype=torch.int8)
    for number in range(blocks):
        block = torch.zeros(2, HALF_BLOCK, width, dtype=torch.int8)
        for half in range(2):
            first = HALF_BLOCK * (blocks * half + number)
            rows = integers[first : first + HALF_BLOCK]
            block[half, : len(rows), :num_inputs] = rows
        packed[number] = block.view(BLOCK_OUTPUTS, width // 4, 4).transpose(0, 1)
    return packed


def out_of_blocks(packed: torch.Tensor, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """int8 [out, in]: the inverse of ``in_blocks``."""
    blocks, width = len(packed), 4 * packed.shape[1]
    outputs = packed.permute(0, 2, 1, 3).reshape(blocks, 2, HALF_BLOCK, width).transpose(0, 1).reshape(-1, width)
    return outputs[:num_outputs, :num_inputs]


def by_blocks(numbers: torch.Tensor) -> torch.Tensor:
    """[n, out] -> [n, blocks, 32], padded with zeros."""
    blocks = padded(numbers.shape[1], BLOCK_OUTPUTS) // BLOCK_OUTPUTS
    padded_numbers = F.pad(numbers, (0, BLOCK_OUTPUTS * blocks - numbers.shape[1]))
    return padded_numbers.view(-1, 2, blocks, HALF_BLOCK).transpose(1, 2).reshape(-1, blocks, BLOCK_OUTPUTS)
