"""How int8 weights and their constants lie in memory for the kernels that multiply them.

A weight lies in blocks, [blocks, inputs / 4, 32, 4], inputs padded with zeros to whole tiles of 64: every instruction
that multiplies bytes takes four inputs of as many outputs as it is wide. A block has sixteen of the first half of the
outputs and sixteen of the second, padded to whole sixteens. Where the first half gates the second, a block has what
belongs together, and only the product of both has to be written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK_OUTPUTS, HALF_BLOCK = 32, 16
"""Outputs of a block of weights, which are two tiles and two vectors of numbers, and of each half."""
TILE_ROWS, TILE_BYTES = 16, 64
BF16_STEP = 32
"""Numbers of bfloat16 in a row of a tile: what a product of such tiles sums over at once."""
PANEL_ROWS = 2 * TILE_ROWS
"""Rows that are multiplied together where there are many; such rows' bytes and sums are padded to it."""
FEW_ROWS = 32
"""Rows that wait for the weights to come from memory."""
UNSPLIT_STEPS = 32
"""Steps of 64 inputs up to which a block is multiplied in one go; more are taken in slabs, and sums in between kept."""
CHUNK_ROWS = 512
"""Rows at once at most; each chunk of a prompt reads all weights."""
NO_GATING, BY_SILU, BY_GELU = 0, 1, 2


def sums_size(num_rows: int, width: int, num_blocks: int) -> int:
    """Bytes that a product of so many rows of padded inputs needs for its sums."""
    whole = num_rows <= FEW_ROWS or width <= TILE_BYTES * UNSPLIT_STEPS
    return 0 if whole else 4 * BLOCK_OUTPUTS * num_blocks * min(CHUNK_ROWS, padded(num_rows, PANEL_ROWS))


def padded(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def in_blocks(integers: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] -> [blocks, in / 4, 32, 4]."""
    num_outputs, num_inputs = integers.shape
    blocks, width = padded(num_outputs, BLOCK_OUTPUTS) // BLOCK_OUTPUTS, padded(num_inputs, TILE_BYTES)
    packed = torch.empty(blocks, width // 4, BLOCK_OUTPUTS, 4, dtype=torch.int8)
    for number in range(blocks):
        whole = torch.zeros(2, HALF_BLOCK, width, dtype=torch.int8)
        for half in range(2):
            first = HALF_BLOCK * (blocks * half + number)
            rows = integers[first : first + HALF_BLOCK]
            whole[half, : len(rows), :num_inputs] = rows
        packed[number] = whole.view(BLOCK_OUTPUTS, width // 4, 4).transpose(0, 1)
    return packed


def out_of_blocks(packed: torch.Tensor, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """int8 [out, in], as it was."""
    blocks, width = len(packed), 4 * packed.shape[1]
    outputs = packed.permute(0, 2, 1, 3).reshape(blocks, 2, HALF_BLOCK, width).transpose(0, 1).reshape(-1, width)
    return outputs[:num_outputs, :num_inputs]


def by_blocks(numbers: torch.Tensor) -> torch.Tensor:
    """[n, out] -> [n, blocks, 32], with zeros for outputs that are not there."""
    blocks = padded(numbers.shape[1], BLOCK_OUTPUTS) // BLOCK_OUTPUTS
    whole = F.pad(numbers, (0, BLOCK_OUTPUTS * blocks - numbers.shape[1]))
    return whole.view(-1, 2, blocks, HALF_BLOCK).transpose(1, 2).reshape(-1, blocks, BLOCK_OUTPUTS)
