"""GEMM of rows of floats and int8 weights: rows are quantized, multiplied, and scaled back, in one call.

How weights lie is told in ``blocks.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit

from cpu_kernels.blocks import (
    BLOCK,
    BY_SILU,
    CHUNK,
    FEW,
    HALF,
    NO_GATING,
    ROW_BLOCK,
    TILE_BYTES,
    TILE_ROWS,
    WHOLE,
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
from cpu_kernels.lora_tiles import list_runs, low_by_b, pairs_of, put_low, put_low_of_rows
from cpu_kernels.native_kernel import NativeKernel
from cpu_kernels.quantize_rows import quantize_row
from cpu_kernels.tiles import configure_few_rows, configure_tiles, may_use_tiles, release_tiles, tile_products

FIELDS = "x rows y gating quantized largest apart sums inputs outputs width blocks weights constants"
FIELDS += " others num_outliers outliers outlier_weights runs parts"
"""Of a GEMM's record. ``x`` float32 [rows, inputs] and ``y`` [rows, outputs], or [rows, outputs / 2] with a ``gating``.
``quantized`` uint8 [whole row tiles, width], ``largest`` float32 [rows], ``apart`` [rows, outliers] and ``sums`` are
for the time of the call. ``constants`` are, for each block, 32 int32 that sums begin with, 32 scales and a bias in
float32. ``others`` float32 [inputs] has 0 at outliers, whose indices are int64 and whose weights float32 [blocks, ..,
32]; 0 for what is not there. Where tiles add adapters' deltas, ``runs`` are as in ``lora_deltas.py``, and ``parts``
int64: how many linears the weight is of, then ``PART`` numbers each."""
_AHEAD_BY_VECTORS = 4096
"""Bytes that vectors' weights are called into the caches ahead, where they come from memory; measured."""
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VERY_FEW = 4
"""Rows that vectors multiply as fast as their weights come."""
_BLOCKS = 16
"""Whose deltas of very few rows are computed at once."""
_TILE_SLAB = 8
"""Steps of 64 inputs whose weights, 16 KB, stay in half of a first cache while all rows use them."""
_SLAB = 128
"""Steps of four inputs whose weights, 16 KB, stay in the first cache while several rows use them."""


def dot_products(rows: int, bits: int, *, prefetch: bool = False) -> Any:
    """``f(x, stride, count, weights, sums)``: sums int32 [rows, 32] += x uint8 [rows, 4 * count] @ a block of weights.

    By VPDPBUSD on vectors of so many bits. ``weights`` int8 [count, 32, 4]; ``stride`` bytes lie between rows of x.
    """
    lanes = bits // 32
    per_block = BLOCK // lanes
    num_registers = (32 if bits == 512 else 16) - 4
    at_once = min(per_block, max(1, num_registers // rows))
    while per_block % at_once:
        at_once -= 1

    def generate(builder: Any, x: Any, stride: Any, count: Any, weights: Any, sums: Any) -> None:
        for first in range(0, per_block, at_once):
            ahead = _AHEAD_BY_VECTORS if prefetch else 0
            _dot_products(builder, rows, lanes, range(first, first + at_once), ahead, (x, stride, count, weights, sums))

    return void_intrinsic(5, generate)


def _dot_products(builder: Any, rows: int, lanes: int, vectors: range, ahead: int, arguments: Any) -> None:
    x, stride, count, weights, sums = arguments
    numbers, octets = ir.VectorType(_I32, lanes), ir.VectorType(_I8, 4 * lanes)
    product = llvm_function(builder, f"x86.avx512.vpdpbusd.{32 * lanes}", numbers, numbers, octets, octets)

    def at(address: Any, offset: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    def sum_at(row: int, vector: int) -> Any:
        return at(sums, _I64(4 * (BLOCK * row + lanes * vector)), numbers)

    cells = [(row, vector) for row in range(rows) for vector in vectors]
    begin = {cell: builder.load(sum_at(*cell), align=4) for cell in cells}
    before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(_I64(0), before)
    current = {cell: builder.phi(numbers) for cell in cells}
    here = builder.add(weights, builder.mul(step, _I64(4 * BLOCK)))
    loaded = {one: builder.load(at(here, _I64(4 * lanes * one), octets), align=1) for one in vectors}
    if ahead:
        prefetch_lines(
            builder, here, range(ahead + 4 * lanes * vectors[0], ahead + 4 * lanes * (vectors[-1] + 1), 64), 2
        )
    after = {}
    for row in range(rows):
        offset = builder.add(builder.mul(stride, _I64(row)), builder.mul(step, _I64(4)))
        four = builder.load(at(x, offset, _I32), align=1)
        single = builder.insert_element(ir.Constant(numbers, ir.Undefined), four, _I32(0))
        repeated = builder.bitcast(builder.shuffle_vector(single, single, ir.Constant(numbers, None)), octets)
        for one in vectors:
            after[row, one] = builder.call(product, [current[row, one], repeated, loaded[one]])
    following = builder.add(step, _I64(1))
    step.add_incoming(following, loop)
    for cell in cells:
        current[cell].add_incoming(begin[cell], before)
        current[cell].add_incoming(after[cell], loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    for cell in cells:
        builder.store(after[cell], sum_at(*cell), align=4)


_blocks_memory = scratch(4 * BLOCK * ROW_BLOCK * _BLOCKS)
_sums_memory, _deltas_memory = scratch(4 * BLOCK * CHUNK), scratch(4 * BLOCK * ROW_BLOCK)
_one_tile, _two_tiles = tile_products(1, prefetch=True), tile_products(2, prefetch=True)
_tiles, _more_tiles = tile_products(2), tile_products(2, add=True)


@njit(error_model="numpy")
def _quantize_into_tiles(a: Any, first: int, end: int) -> None:
    """Rows, as tiles of 16 rows and 64 bytes lie one behind the other."""
    for row in range(first, end):
        target = a.quantized + row // TILE_ROWS * TILE_ROWS * a.width + row % TILE_ROWS * TILE_BYTES
        quantize_row(a, row, target, TILE_ROWS * TILE_BYTES)


@njit(error_model="numpy")
def _prepare_many_rows(a: Any, changed: bool) -> None:
    """This thread's rows on tiles, and, where adapters change some, their products with A while they are at hand."""
    me, team, tiles = thread_number(), num_threads(), (a.rows + ROW_BLOCK - 1) // ROW_BLOCK * 2
    for tile in range(tiles * me // team, tiles * (me + 1) // team):
        _quantize_into_tiles(a, TILE_ROWS * tile, min(a.rows, TILE_ROWS * (tile + 1)))
        if changed:
            put_low_of_rows(a, tile)


def _by_dot_products(bits: int, deltas_of: Any = no_deltas) -> Callable[[Any], None]:
    """x @ weights where vectors of so many bits multiply bytes; ``deltas_of`` gives what adapters add to a few rows."""
    one, two, four = (dot_products(rows, bits, prefetch=True) for rows in (1, 2, 4))
    most = 8 if bits == 512 else 4
    many = dot_products(most, bits)

    def by_dot_products(a: Any) -> None:
        me, team = thread_number(), num_threads()
        for row in range(a.rows * me // team, a.rows * (me + 1) // team):
            quantize_row(a, row, a.quantized + row * a.width, TILE_BYTES)
        barrier()
        sums, memory, deltas = _sums_memory(), _blocks_memory(), 0
        first, end = a.blocks * me // team, a.blocks * (me + 1) // team
        for block in range(first, end):
            place = (block - first) % _BLOCKS
            if place == 0:
                deltas = deltas_of(a, block, min(_BLOCKS, end - block), memory)
            mine = deltas + 4 * BLOCK * ROW_BLOCK * place if deltas else 0
            for chunk in range(0, a.rows, CHUNK):
                rows = min(a.rows - chunk, CHUNK)
                begin = integers(a.constants + 12 * BLOCK * block)
                for row in range(rows):
                    for i in range(BLOCK):
                        integers(sums)[BLOCK * row + i] = begin[i]
                for slab in range(0, a.width // 4, _SLAB):
                    steps = min(a.width // 4 - slab, _SLAB)
                    weights = a.weights + (block * a.width // 4 + slab) * 4 * BLOCK
                    row = 0
                    while row < rows:
                        grid, here = a.quantized + (chunk + row) * a.width + 4 * slab, sums + 4 * BLOCK * row
                        if rows - row >= most:
                            many(grid, a.width, steps, weights, here)
                            row += most
                        elif rows - row >= 4:
                            four(grid, a.width, steps, weights, here)
                            row += 4
                        elif rows - row >= 2:
                            two(grid, a.width, steps, weights, here)
                            row += 2
                        else:
                            one(grid, a.width, steps, weights, here)
                            row += 1
                finish(a, chunk, rows, block, sums, mine)

    return by_dot_products


@njit(error_model="numpy")
def _few_rows_by_tiles(a: Any, first: int, end: int) -> None:
    """Products of up to 32 rows with these blocks, which come from memory."""
    sums, apart = _sums_memory(), TILE_ROWS * a.width
    for block in range(first, end):
        weights, begin = a.weights + block * a.width * BLOCK, a.constants + 12 * BLOCK * block
        if a.rows <= TILE_ROWS:
            _one_tile(a.quantized, apart, a.width // TILE_BYTES, weights, sums, 4 * BLOCK, begin)
        else:
            _two_tiles(a.quantized, apart, a.width // TILE_BYTES, weights, sums, 4 * BLOCK, begin)
        finish_with_deltas(a, 0, a.rows, block, sums)


@njit(error_model="numpy")
def _many_rows_by_tiles(a: Any, chunk: int, first: int, end: int) -> None:
    """Products of a chunk of rows with these blocks, in slabs that stay in the first cache while all rows use them."""
    steps, last, apart = a.width // TILE_BYTES, min(a.rows, chunk + CHUNK), TILE_ROWS * a.width
    slabs = 1 if steps <= WHOLE else (steps + _TILE_SLAB - 1) // _TILE_SLAB
    per_block = (last - chunk + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
    for slab in range(slabs):
        first_step = steps * slab // slabs
        count = steps * (slab + 1) // slabs - first_step
        for block in range(first, end):
            weights = a.weights + (block * a.width + first_step * TILE_BYTES) * BLOCK
            begin = a.constants + 12 * BLOCK * block
            for row in range(chunk, last, ROW_BLOCK):
                grid = a.quantized + row * a.width + first_step * TILE_ROWS * TILE_BYTES
                sums = _sums_memory()
                if slabs > 1:
                    sums = a.sums + 4 * BLOCK * (block * per_block + row - chunk)
                if slab:
                    _more_tiles(grid, apart, count, weights, sums, 4 * BLOCK, begin)
                else:
                    _tiles(grid, apart, count, weights, sums, 4 * BLOCK, begin)
                if slab == slabs - 1:
                    finish_with_deltas(a, row, min(last - row, ROW_BLOCK), block, sums)


def _many_gated_rows_by_tiles(gate: Gate, *, with_deltas: bool) -> Any:
    """As ``_many_rows_by_tiles`` in one slab, where each panel of rows is gated beside the products of the next."""
    beside = gated_beside_products(gate, with_deltas=with_deltas)
    rows_of = gated_sums(gate, with_deltas=with_deltas)

    @njit(error_model="numpy")
    def multiply(a: Any, chunk: int, first: int, end: int) -> None:
        steps, last, apart = a.width // TILE_BYTES, min(a.rows, chunk + CHUNK), TILE_ROWS * a.width
        memory, deltas, stride = _sums_memory(), _deltas_memory(), 4 * HALF * a.blocks
        sums, ready, count = memory, memory + 4 * BLOCK * ROW_BLOCK, 0
        constants, largest, y = a.constants, a.largest, a.y
        for block in range(first, end):
            weights, begin = a.weights + block * a.width * BLOCK, a.constants + 12 * BLOCK * block
            for row in range(chunk, last, ROW_BLOCK):
                grid, done = a.quantized + row * a.width, min(count, BESIDE * steps)
                if count == 0:
                    _tiles(grid, apart, steps, weights, sums, 4 * BLOCK, begin)
                else:
                    beside(
                        grid, apart, steps, weights, sums, 4 * BLOCK, begin,
                        count - 1, ready, constants, largest, y, stride, deltas,
                    )  # fmt: skip
                if done < count:
                    rows_of(
                        count - done, ready + 4 * BLOCK * done, constants, largest + 4 * done, y + stride * done,
                        stride, deltas + 4 * HALF * done,
                    )  # fmt: skip
                sums, ready, count, constants = ready, sums, min(last - row, ROW_BLOCK), begin
                largest, y = a.largest + 4 * row, a.y + row * stride + 4 * HALF * block
                if with_deltas:
                    low_by_b(a, row, count, block, deltas)
        if count:
            rows_of(count, ready, constants, largest, y, stride, deltas)

    return multiply


def _by_tiles() -> Callable[[Any], None]:
    """x @ weights where AMX multiplies bytes. A few rows, which only wait for memory, are multiplied by vectors."""
    very_few_rows = njit(error_model="numpy")(_by_dot_products(512, deltas_of_blocks))
    by_silu, by_gelu = (_many_gated_rows_by_tiles(gate, with_deltas=False) for gate in (SILU, GELU))
    changed_by_silu, changed_by_gelu = (_many_gated_rows_by_tiles(gate, with_deltas=True) for gate in (SILU, GELU))

    def by_tiles(a: Any) -> None:
        me, team = thread_number(), num_threads()
        changed = a.runs != 0 and longs(a.runs)[0] > 0
        if a.rows > TILE_ROWS:
            configure_tiles()
        elif a.rows > _VERY_FEW or changed:
            configure_few_rows(a.rows, pairs_of(a) if changed else TILE_ROWS)
        if changed and me == 0:
            list_runs(a)
        if a.rows > FEW:
            _prepare_many_rows(a, changed)
        elif changed:
            put_low(a)
        if a.rows <= _VERY_FEW:
            very_few_rows(a)
            if changed:
                release_tiles()
            return
        if a.rows <= FEW:
            _quantize_into_tiles(a, a.rows * me // team, a.rows * (me + 1) // team)
        barrier()
        first, end = a.blocks * me // team, a.blocks * (me + 1) // team
        if a.rows <= FEW:
            _few_rows_by_tiles(a, first, end)
        else:
            beside = a.gating != NO_GATING and a.num_outliers == 0 and a.width <= TILE_BYTES * WHOLE
            for chunk in range(0, a.rows, CHUNK):
                if not beside:
                    _many_rows_by_tiles(a, chunk, first, end)
                elif a.gating == BY_SILU and changed:
                    changed_by_silu(a, chunk, first, end)
                elif a.gating == BY_SILU:
                    by_silu(a, chunk, first, end)
                elif changed:
                    changed_by_gelu(a, chunk, first, end)
                else:
                    by_gelu(a, chunk, first, end)
        release_tiles()

    return by_tiles


@cache
def gemm_kernels() -> dict[str, NativeKernel]:
    """Those that this CPU can run, by the instructions they use, fastest first."""
    found: dict[str, Callable[[Any], None]] = {}
    if has_features("amx-int8", "amx-bf16", "amx-tile", "avx512bf16") and may_use_tiles():
        found["AMX"] = _by_tiles()
    if has_features("avx512vnni", "avx512f"):
        found["AVX512-VNNI"] = _by_dot_products(512)
    if has_features("avxvnni"):
        found["AVX-VNNI"] = _by_dot_products(256)
    return {name: NativeKernel(body, FIELDS) for name, body in found.items()}
