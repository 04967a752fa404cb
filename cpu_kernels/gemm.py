"""GEMM of float32 rows with int8 weights (W8A8): quantize rows, multiply integers, scale sums back, in one call.

``blocks.py`` describes the layout of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit

from cpu_kernels.blocks import (
    BLOCK_OUTPUTS,
    BY_SILU,
    CHUNK_ROWS,
    FEW_ROWS,
    HALF_BLOCK,
    NO_GATING,
    PANEL_ROWS,
    TILE_BYTES,
    TILE_ROWS,
    UNSPLIT_STEPS,
)
from cpu_kernels.epilogue import deltas_of_blocks, finish, finish_with_deltas, no_deltas
from cpu_kernels.gating import BESIDE, GELU, SILU, Gate, gated_beside_products, gated_sums
from cpu_kernels.intrinsics import (
    barrier,
    has_features,
    integers,
    llvm_function,
    longs,
    num_threads,
    prefetch_lines,
    scratch,
    thread_number,
    void_intrinsic,
)
from cpu_kernels.lora_tiles import list_tasks, multiply_a_few_rows, multiply_a_row_tile, multiply_b, rank_pairs
from cpu_kernels.native_kernel import NativeKernel
from cpu_kernels.quantize_rows import quantize_row
from cpu_kernels.tiles import configure_few_rows, configure_tiles, may_use_tiles, release_tiles, tile_products

FIELDS = "x rows y gating quantized absmax outlier_inputs sums inputs outputs width blocks weights constants"
FIELDS += " inlier_mask num_outliers outlier_indices outlier_weights tasks linears"
"""The record of a GEMM: addresses and counts, all int64; an address is 0 where its array is missing.

``x`` float32 [rows, inputs]; ``y`` float32 [rows, outputs], or [rows, outputs / 2] where ``gating`` is set.
Memory for this call only: ``quantized`` uint8 [rows padded to row tiles, width], ``absmax`` float32 [rows],
``outlier_inputs`` float32 [rows, num_outliers], ``sums`` int32 (``blocks.sums_size``).
``weights`` int8 [blocks, width / 4, 32, 4]; ``constants`` [blocks, 3, 32]: int32 initial sums, float32 scales, float32
bias. ``inlier_mask`` float32 [inputs], 0 at outliers; ``outlier_indices`` int64 [num_outliers]; ``outlier_weights``
float32 [blocks, num_outliers, 32].
Where AMX adds LoRA deltas, ``tasks`` is the step's task table (``lora_deltas.FIELDS``), and ``linears`` int64: how many
linears the weight joins, then ``LINEAR_ENTRY_SIZE`` numbers each (``lora_tiles.py``).
"""
_PREFETCH_DISTANCE = 4096
"""Bytes ahead of the current weights that vectors prefetch, where weights come from memory; measured."""
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VECTOR_ROWS = 4
"""Up to so many rows vectors multiply as fast as memory delivers the weights, so tiles would gain nothing."""
_DELTA_BLOCKS = 16
"""Blocks whose LoRA deltas are computed together for up to ``_VECTOR_ROWS`` rows."""
_TILE_SLAB_STEPS = 8
"""Steps of 64 inputs in a slab: 16 KB of weights, which stay in half of the L1 cache while all rows use them."""
_VECTOR_SLAB_STEPS = 128
"""Steps of four inputs in a slab: 16 KB of weights, which stay in the L1 cache while several rows use them."""


def dot_products(rows: int, bits: int, *, prefetch: bool = False) -> Any:
    """``f(x, stride, count, weights, sums)``: sums int32 [rows, 32] += x uint8 [rows, 4 * count] @ a block of weights.

    By VPDPBUSD on vectors of ``bits`` bits. ``weights`` int8 [count, 32, 4]; ``stride``: bytes between rows of x.
    """
    lanes = bits // 32
    per_block = BLOCK_OUTPUTS // lanes
    num_registers = (32 if bits == 512 else 16) - 4
    at_once = min(per_block, max(1, num_registers // rows))
    while per_block % at_once:
        at_once -= 1

    def generate(builder: Any, x: Any, stride: Any, count: Any, weights: Any, sums: Any) -> None:
        for first in range(0, per_block, at_once):
            ahead = _PREFETCH_DISTANCE if prefetch else 0
            _dot_products(builder, rows, lanes, range(first, first + at_once), ahead, (x, stride, count, weights, sums))

    return void_intrinsic(5, generate)


def _dot_products(builder: Any, rows: int, lanes: int, vectors: range, ahead: int, arguments: Any) -> None:
    x, stride, count, weights, sums = arguments
    numbers, octets = ir.VectorType(_I32, lanes), ir.VectorType(_I8, 4 * lanes)
    product = llvm_function(builder, f"x86.avx512.vpdpbusd.{32 * lanes}", numbers, numbers, octets, octets)

    def at(address: Any, offset: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    def sum_at(row: int, vector: int) -> Any:
        return at(sums, _I64(4 * (BLOCK_OUTPUTS * row + lanes * vector)), numbers)

    cells = [(row, vector) for row in range(rows) for vector in vectors]
    initial = {cell: builder.load(sum_at(*cell), align=4) for cell in cells}
    before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(_I64(0), before)
    current = {cell: builder.phi(numbers) for cell in cells}
    step_weights = builder.add(weights, builder.mul(step, _I64(4 * BLOCK_OUTPUTS)))
    loaded = {vector: builder.load(at(step_weights, _I64(4 * lanes * vector), octets), align=1) for vector in vectors}
    if ahead:
        offsets = range(ahead + 4 * lanes * vectors[0], ahead + 4 * lanes * (vectors[-1] + 1), 64)
        prefetch_lines(builder, step_weights, offsets, 2)
    after = {}
    for row in range(rows):
        offset = builder.add(builder.mul(stride, _I64(row)), builder.mul(step, _I64(4)))
        four_inputs = builder.load(at(x, offset, _I32), align=1)
        single = builder.insert_element(ir.Constant(numbers, ir.Undefined), four_inputs, _I32(0))
        repeated = builder.bitcast(builder.shuffle_vector(single, single, ir.Constant(numbers, None)), octets)
        for vector in vectors:
            after[row, vector] = builder.call(product, [current[row, vector], repeated, loaded[vector]])
    following = builder.add(step, _I64(1))
    step.add_incoming(following, loop)
    for cell in cells:
        current[cell].add_incoming(initial[cell], before)
        current[cell].add_incoming(after[cell], loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    for cell in cells:
        builder.store(after[cell], sum_at(*cell), align=4)


_blocks_memory = scratch(4 * BLOCK_OUTPUTS * PANEL_ROWS * _DELTA_BLOCKS)
_sums_memory, _deltas_memory = scratch(4 * BLOCK_OUTPUTS * CHUNK_ROWS), scratch(4 * BLOCK_OUTPUTS * PANEL_ROWS)
_one_tile, _two_tiles = tile_products(1, prefetch=True), tile_products(2, prefetch=True)
_tiles, _more_tiles = tile_products(2), tile_products(2, add=True)


@njit(error_model="numpy")
def _quantize_into_tiles(a: Any, first: int, end: int) -> None:
    """Quantize rows into ``quantized`` as tiles uint8 [row tiles, width / 64, 16, 64]."""
    for row in range(first, end):
        target = a.quantized + row // TILE_ROWS * TILE_ROWS * a.width + row % TILE_ROWS * TILE_BYTES
        quantize_row(a, row, target, TILE_ROWS * TILE_BYTES)


@njit(error_model="numpy")
def _prepare_many_rows(a: Any, has_deltas: bool) -> None:
    """Quantize this thread's row tiles; with ``has_deltas`` also compute their x @ A, while x is cached."""
    thread, team_size, tiles = thread_number(), num_threads(), (a.rows + PANEL_ROWS - 1) // PANEL_ROWS * 2
    for tile in range(tiles * thread // team_size, tiles * (thread + 1) // team_size):
        _quantize_into_tiles(a, TILE_ROWS * tile, min(a.rows, TILE_ROWS * (tile + 1)))
        if has_deltas:
            multiply_a_row_tile(a, tile)


def _by_dot_products(bits: int, deltas_of: Any = no_deltas) -> Callable[[Any], None]:
    """The GEMM by VPDPBUSD on vectors of ``bits`` bits; ``deltas_of`` computes the LoRA deltas of a few rows."""
    one_row, two_rows, four_rows = (dot_products(rows, bits, prefetch=True) for rows in (1, 2, 4))
    max_rows = 8 if bits == 512 else 4
    many_rows = dot_products(max_rows, bits)

    def by_dot_products(a: Any) -> None:
        thread, team_size = thread_number(), num_threads()
        for row in range(a.rows * thread // team_size, a.rows * (thread + 1) // team_size):
            quantize_row(a, row, a.quantized + row * a.width, TILE_BYTES)
        barrier()
        sums, delta_memory, deltas = _sums_memory(), _blocks_memory(), 0
        first, end = a.blocks * thread // team_size, a.blocks * (thread + 1) // team_size
        for block in range(first, end):
            place = (block - first) % _DELTA_BLOCKS
            if place == 0:
                deltas = deltas_of(a, block, min(_DELTA_BLOCKS, end - block), delta_memory)
            block_deltas = deltas + 4 * BLOCK_OUTPUTS * PANEL_ROWS * place if deltas else 0
            for chunk in range(0, a.rows, CHUNK_ROWS):
                rows = min(a.rows - chunk, CHUNK_ROWS)
                initial = integers(a.constants + 12 * BLOCK_OUTPUTS * block)
                for row in range(rows):
                    for i in range(BLOCK_OUTPUTS):
                        integers(sums)[BLOCK_OUTPUTS * row + i] = initial[i]
                for slab in range(0, a.width // 4, _VECTOR_SLAB_STEPS):
                    steps = min(a.width // 4 - slab, _VECTOR_SLAB_STEPS)
                    weights = a.weights + (block * a.width // 4 + slab) * 4 * BLOCK_OUTPUTS
                    row = 0
                    while row < rows:
                        x = a.quantized + (chunk + row) * a.width + 4 * slab
                        row_sums = sums + 4 * BLOCK_OUTPUTS * row
                        if rows - row >= max_rows:
                            many_rows(x, a.width, steps, weights, row_sums)
                            row += max_rows
                        elif rows - row >= 4:
                            four_rows(x, a.width, steps, weights, row_sums)
                            row += 4
                        elif rows - row >= 2:
                            two_rows(x, a.width, steps, weights, row_sums)
                            row += 2
                        else:
                            one_row(x, a.width, steps, weights, row_sums)
                            row += 1
                finish(a, chunk, rows, block, sums, block_deltas)

    return by_dot_products


@njit(error_model="numpy")
def _few_rows_by_tiles(a: Any, first: int, end: int) -> None:
    """Blocks ``first`` to ``end`` for up to 32 rows: the weights come from memory, and are prefetched."""
    sums, tile_stride = _sums_memory(), TILE_ROWS * a.width
    for block in range(first, end):
        weights = a.weights + block * a.width * BLOCK_OUTPUTS
        initial = a.constants + 12 * BLOCK_OUTPUTS * block
        if a.rows <= TILE_ROWS:
            _one_tile(a.quantized, tile_stride, a.width // TILE_BYTES, weights, sums, 4 * BLOCK_OUTPUTS, initial)
        else:
            _two_tiles(a.quantized, tile_stride, a.width // TILE_BYTES, weights, sums, 4 * BLOCK_OUTPUTS, initial)
        finish_with_deltas(a, 0, a.rows, block, sums)


@njit(error_model="numpy")
def _many_rows_by_tiles(a: Any, chunk: int, first: int, end: int) -> None:
    """Blocks ``first`` to ``end`` for the rows from ``chunk`` on, in slabs whose weights stay in the L1 cache."""
    steps, last, tile_stride = a.width // TILE_BYTES, min(a.rows, chunk + CHUNK_ROWS), TILE_ROWS * a.width
    slabs = 1 if steps <= UNSPLIT_STEPS else (steps + _TILE_SLAB_STEPS - 1) // _TILE_SLAB_STEPS
    padded_rows = (last - chunk + PANEL_ROWS - 1) // PANEL_ROWS * PANEL_ROWS
    for slab in range(slabs):
        first_step = steps * slab // slabs
        count = steps * (slab + 1) // slabs - first_step
        for block in range(first, end):
            weights = a.weights + (block * a.width + first_step * TILE_BYTES) * BLOCK_OUTPUTS
            initial = a.constants + 12 * BLOCK_OUTPUTS * block
            for row in range(chunk, last, PANEL_ROWS):
                x = a.quantized + row * a.width + first_step * TILE_ROWS * TILE_BYTES
                sums = _sums_memory()
                if slabs > 1:
                    sums = a.sums + 4 * BLOCK_OUTPUTS * (block * padded_rows + row - chunk)
                if slab:
                    _more_tiles(x, tile_stride, count, weights, sums, 4 * BLOCK_OUTPUTS, initial)
                else:
                    _tiles(x, tile_stride, count, weights, sums, 4 * BLOCK_OUTPUTS, initial)
                if slab == slabs - 1:
                    finish_with_deltas(a, row, min(last - row, PANEL_ROWS), block, sums)


def _many_gated_rows_by_tiles(gate: Gate, *, with_deltas: bool) -> Any:
    """As ``_many_rows_by_tiles`` in one slab; vectors gate a panel of rows while tiles multiply the next panel."""
    multiply_and_gate = gated_beside_products(gate, with_deltas=with_deltas)
    gate_rows = gated_sums(gate, with_deltas=with_deltas)

    @njit(error_model="numpy")
    def multiply(a: Any, chunk: int, first: int, end: int) -> None:
        steps, last, tile_stride = a.width // TILE_BYTES, min(a.rows, chunk + CHUNK_ROWS), TILE_ROWS * a.width
        memory, deltas, y_stride = _sums_memory(), _deltas_memory(), 4 * HALF_BLOCK * a.blocks
        # the panel multiplied before, which is yet to be gated: its sums, number of rows, and what scales them
        sums, ready_sums, ready_rows = memory, memory + 4 * BLOCK_OUTPUTS * PANEL_ROWS, 0
        constants, absmax, y = a.constants, a.absmax, a.y
        for block in range(first, end):
            weights = a.weights + block * a.width * BLOCK_OUTPUTS
            initial = a.constants + 12 * BLOCK_OUTPUTS * block
            for row in range(chunk, last, PANEL_ROWS):
                x, gated_rows = a.quantized + row * a.width, min(ready_rows, BESIDE * steps)
                if ready_rows == 0:
                    _tiles(x, tile_stride, steps, weights, sums, 4 * BLOCK_OUTPUTS, initial)
                else:
                    multiply_and_gate(
                        x, tile_stride, steps, weights, sums, 4 * BLOCK_OUTPUTS, initial,
                        ready_rows - 1, ready_sums, constants, absmax, y, y_stride, deltas,
                    )  # fmt: skip
                if gated_rows < ready_rows:
                    gate_rows(
                        ready_rows - gated_rows, ready_sums + 4 * BLOCK_OUTPUTS * gated_rows, constants,
                        absmax + 4 * gated_rows, y + y_stride * gated_rows, y_stride,
                        deltas + 4 * HALF_BLOCK * gated_rows,
                    )  # fmt: skip
                sums, ready_sums = ready_sums, sums
                ready_rows = min(last - row, PANEL_ROWS)
                constants = initial
                absmax = a.absmax + 4 * row
                y = a.y + row * y_stride + 4 * HALF_BLOCK * block
                if with_deltas:
                    multiply_b(a, row, ready_rows, block, deltas)
        if ready_rows:
            gate_rows(ready_rows, ready_sums, constants, absmax, y, y_stride, deltas)

    return multiply


def _by_tiles() -> Callable[[Any], None]:
    """The GEMM by AMX. Up to ``_VECTOR_ROWS`` rows, which only wait for memory, are multiplied by vectors."""
    very_few_rows = njit(error_model="numpy")(_by_dot_products(512, deltas_of_blocks))
    silu_rows, gelu_rows = (_many_gated_rows_by_tiles(gate, with_deltas=False) for gate in (SILU, GELU))
    silu_rows_with_deltas, gelu_rows_with_deltas = (
        _many_gated_rows_by_tiles(gate, with_deltas=True) for gate in (SILU, GELU)
    )

    def by_tiles(a: Any) -> None:
        thread, team_size = thread_number(), num_threads()
        has_deltas = a.tasks != 0 and longs(a.tasks)[0] > 0
        if a.rows > TILE_ROWS:
            configure_tiles()
        elif a.rows > _VECTOR_ROWS or has_deltas:
            configure_few_rows(a.rows, rank_pairs(a) if has_deltas else TILE_ROWS)
        if has_deltas and thread == 0:
            list_tasks(a)
        if a.rows > FEW_ROWS:
            _prepare_many_rows(a, has_deltas)
        elif has_deltas:
            multiply_a_few_rows(a)
        if a.rows <= _VECTOR_ROWS:
            very_few_rows(a)
            if has_deltas:
                release_tiles()
            return
        if a.rows <= FEW_ROWS:
            _quantize_into_tiles(a, a.rows * thread // team_size, a.rows * (thread + 1) // team_size)
        barrier()
        first, end = a.blocks * thread // team_size, a.blocks * (thread + 1) // team_size
        if a.rows <= FEW_ROWS:
            _few_rows_by_tiles(a, first, end)
        else:
            beside = a.gating != NO_GATING and a.num_outliers == 0 and a.width <= TILE_BYTES * UNSPLIT_STEPS
            for chunk in range(0, a.rows, CHUNK_ROWS):
                if not beside:
                    _many_rows_by_tiles(a, chunk, first, end)
                elif a.gating == BY_SILU and has_deltas:
                    silu_rows_with_deltas(a, chunk, first, end)
                elif a.gating == BY_SILU:
                    silu_rows(a, chunk, first, end)
                elif has_deltas:
                    gelu_rows_with_deltas(a, chunk, first, end)
                else:
                    gelu_rows(a, chunk, first, end)
        release_tiles()

    return by_tiles


class GemmKernel(NativeKernel):
    """A GEMM for one instruction set; ``adds_deltas``: whether it adds LoRA deltas itself."""

    def __init__(self, body: Callable[[Any], None], *, adds_deltas: bool = False) -> None:
        super().__init__(body, FIELDS)
        self.adds_deltas = adds_deltas


@cache
def gemm_kernels() -> dict[str, GemmKernel]:
    """The GEMM kernels that this CPU can run, by the name of their instruction set, fastest first."""
    kernels: dict[str, GemmKernel] = {}
    if has_features("amx-int8", "amx-bf16", "amx-tile", "avx512bf16") and may_use_tiles():
        kernels["AMX"] = GemmKernel(_by_tiles(), adds_deltas=True)
    if has_features("avx512vnni", "avx512f"):
        kernels["AVX512-VNNI"] = GemmKernel(_by_dot_products(512))
    if has_features("avxvnni"):
        kernels["AVX-VNNI"] = GemmKernel(_by_dot_products(256))
    return kernels
