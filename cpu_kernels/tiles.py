"""AMX tiles: registers of 16 rows of 64 bytes, products of bytes (TDPBUSD) or of bfloat16 (TDPBF16PS)."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import BLOCK_OUTPUTS, TILE_BYTES, TILE_ROWS
from cpu_kernels.intrinsics import llvm_function, loop, prefetch_lines, void_intrinsic

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_PREFETCH_DISTANCE = 8192
"""Bytes ahead that weights are prefetched, where they come from memory; measured."""

FEW_ROWS_TILES, LOW_TILE, B_TILES = (0, 1, 4), 2, (3, 5)
"""Tile registers of a product of up to 16 rows: of sums and inputs, of x @ A, and of B for each half of the outputs."""
_WIDTHS_AT, _ROWS_AT = 16, 48
"""Offsets of the tiles' bytes per row (16 bits each) and rows (8 bits each) in a tile configuration."""
_ARCH_PRCTL = (158, 0x1023, 18)
"""The number of the system call on x86-64, ARCH_REQ_XCOMP_PERM, and XTILEDATA."""


@cache
def may_use_tiles() -> bool:
    """Ask Linux for permission to use the AMX registers; whether it was given."""
    return platform.machine() == "x86_64" and ctypes.CDLL(None).syscall(*_ARCH_PRCTL) == 0


def _configured(rows: Sequence[int], widths: Sequence[int]) -> bytes:
    """A configuration of eight tiles (Intel SDM, LDTILECFG)."""
    return bytes([1, 0, *[0] * 14, *(byte for width in widths for byte in (width, 0)), *[0] * 16, *rows, *[0] * 8])


def tile_function(builder: Any, name: str, *kinds: Any) -> Any:
    """An instruction of AMX, by the name of LLVM's intrinsic."""
    return llvm_function(builder, f"x86.{name}", ir.VoidType(), *kinds)


def _configure(builder: Any, config: bytes, changes: Mapping[int, Any]) -> None:
    kind = ir.ArrayType(_I8, len(config))
    with builder.goto_entry_block():
        memory = builder.alloca(kind)
    builder.store(ir.Constant(kind, bytearray(config)), memory)
    first = builder.bitcast(memory, _I8.as_pointer())
    for place, value in changes.items():
        builder.store(builder.trunc(value, _I8), builder.gep(first, [_I64(place)]))
    builder.call(tile_function(builder, "ldtilecfg", _I8.as_pointer()), [first])


def _configure_whole(builder: Any) -> None:
    _configure(builder, _configured([TILE_ROWS] * 8, [TILE_BYTES] * 8), {})


def _configure_few(builder: Any, rows: Any, pairs: Any) -> None:
    changes = {_ROWS_AT + tile: rows for tile in (*FEW_ROWS_TILES, LOW_TILE)}
    changes |= {_ROWS_AT + tile: pairs for tile in B_TILES}
    changes[_WIDTHS_AT + 2 * LOW_TILE] = builder.mul(pairs, _I64(4))
    _configure(builder, _configured([TILE_ROWS] * 8, [TILE_BYTES] * 8), changes)


def _release(builder: Any) -> None:
    builder.call(tile_function(builder, "tilerelease"), [])


configure_tiles = void_intrinsic(0, _configure_whole)
"""``f()``: all eight tiles with 16 rows of 64 bytes."""
configure_few_rows = void_intrinsic(2, _configure_few)
"""``f(rows, pairs)``: tiles of sums and inputs have ``rows`` (up to 16) rows, tiles of B ``pairs`` pairs of ranks."""
release_tiles = void_intrinsic(0, _release)


def tile_products(
    row_tiles: int, *, of: str = "tdpbusd", prefetch: bool = False, add: bool = False, fresh: bool = False
) -> Any:
    """``f(x, tile_stride, count, weights, sums, stride, initial)``: sums [16 * row_tiles, 32] = initial + x @ weights.

    By TDPBUSD x is uint8 [row_tiles, count, 16, 64], weights are int8 [count, 16, 32, 4] and sums int32; by TDPBF16PS
    x is bfloat16 [row_tiles, count, 16, 32], weights are [count, 16, 32, 2] and sums float32. ``tile_stride``: bytes
    from one row tile of x to the next; ``stride``: bytes from row to row of sums. ``initial`` [32] is where the sums of
    each row start; with ``add`` they start from the sums in memory, with ``fresh`` from zero.
    """

    def generate(builder: Any, *arguments: Any) -> None:
        multiply_tiles(builder, row_tiles, arguments, of=of, prefetch=prefetch, add=add, fresh=fresh)

    return void_intrinsic(7, generate)


def multiply_tiles(
    builder: Any,
    row_tiles: int,
    arguments: Sequence[Any],
    *,
    of: str = "tdpbusd",
    prefetch: bool = False,
    add: bool = False,
    fresh: bool = False,
    beside: Callable[[Any], None] | None = None,
) -> None:
    """The code of ``tile_products``; ``beside(step)`` emits more code into each step."""
    x, tile_stride, count, weights, sums, stride, initial = arguments
    pointer = _I8.as_pointer()
    load = tile_function(builder, "tileloadd64", _I8, pointer, _I64)
    store = tile_function(builder, "tilestored64", _I8, pointer, _I64)
    product = tile_function(builder, of, _I8, _I8, _I8)

    def at(address: Any, offset: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), pointer)

    cells = [(row, column) for row in range(row_tiles) for column in range(2)]
    firsts = [builder.add(sums, builder.mul(stride, _I64(TILE_ROWS * row))) for row in range(row_tiles)]
    places = {(row, column): at(firsts[row], _I64(TILE_BYTES * column)) for row, column in cells}
    tiles = {cell: _I8(number) for number, cell in enumerate(cells)}
    for cell in cells:
        if fresh:
            builder.call(tile_function(builder, "tilezero", _I8), [tiles[cell]])
            continue
        first = places[cell] if add else at(initial, _I64(TILE_BYTES * cell[1]))
        builder.call(load, [tiles[cell], first, stride if add else _I64(0)])

    def step(number: Any, _: list[Any]) -> list[Any]:
        step_weights = builder.add(weights, builder.mul(number, _I64(64 * BLOCK_OUTPUTS)))
        if prefetch:
            prefetch_lines(
                builder, step_weights, range(_PREFETCH_DISTANCE, _PREFETCH_DISTANCE + 64 * BLOCK_OUTPUTS, 64), 3
            )
        step_x = builder.add(x, builder.mul(number, _I64(TILE_ROWS * TILE_BYTES)))
        for row in range(row_tiles):
            row_tile = at(step_x, builder.mul(tile_stride, _I64(row)))
            builder.call(load, [_I8(4 + row), row_tile, _I64(TILE_BYTES)])
        for column in range(2):
            builder.call(load, [_I8(6 + column), at(step_weights, _I64(64 * column)), _I64(4 * BLOCK_OUTPUTS)])
            for row in range(row_tiles):
                builder.call(product, [tiles[row, column], _I8(4 + row), _I8(6 + column)])
        if beside is not None:
            beside(number)
        return []

    loop(builder, count, [], step)
    for cell in cells:
        builder.call(store, [tiles[cell], places[cell], stride])
