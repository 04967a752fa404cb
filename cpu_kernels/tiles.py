"""Tiles of AMX: 16 rows of 64 bytes, which multiply bytes (TDPBUSD) or numbers of 16 bits (TDPBF16PS)."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import BLOCK, TILE_BYTES, TILE_ROWS
from cpu_kernels.intrinsics import llvm_function, loop, prefetch_lines, void_intrinsic

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_AHEAD = 8192
"""Bytes that weights are called into the caches ahead of the products, where they come from memory; measured."""

FEW_ROWS, LOW_TILE, B_TILES = (0, 1, 4), 2, (3, 5)
"""Of a product of up to 16 rows: the tiles of sums and of inputs, of x @ A, and of B for either half of outputs."""
_WIDTHS_AT, _ROWS_AT = 16, 48
_ARCH_PRCTL = (158, 0x1023, 18)
"""The number of the system call on x86-64, ARCH_REQ_XCOMP_PERM, and XTILEDATA."""


@cache
def may_use_tiles() -> bool:
    """Ask Linux for the registers of AMX, which a process has only then."""
    return platform.machine() == "x86_64" and ctypes.CDLL(None).syscall(*_ARCH_PRCTL) == 0


def _configured(rows: Sequence[int], widths: Sequence[int]) -> bytes:
    """Of eight tiles (Intel SDM, LDTILECFG)."""
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
    changes = {_ROWS_AT + tile: rows for tile in (*FEW_ROWS, LOW_TILE)} | {_ROWS_AT + tile: pairs for tile in B_TILES}
    changes[_WIDTHS_AT + 2 * LOW_TILE] = builder.mul(pairs, _I64(4))
    _configure(builder, _configured([TILE_ROWS] * 8, [TILE_BYTES] * 8), changes)


def _release(builder: Any) -> None:
    builder.call(tile_function(builder, "tilerelease"), [])


configure_tiles = void_intrinsic(0, _configure_whole)
"""``f()``: all eight tiles with 16 rows of 64 bytes."""
configure_few_rows = void_intrinsic(2, _configure_few)
"""``f(rows, pairs)``: sums and inputs of so many rows, up to 16, and low-rank products of so many pairs of ranks."""
release_tiles = void_intrinsic(0, _release)


def tile_products(
    row_tiles: int, *, of: str = "tdpbusd", prefetch: bool = False, add: bool = False, fresh: bool = False
) -> Any:
    """``f(x, apart, count, weights, sums, stride, begin)``: sums [16 * row_tiles, 32] = x @ a block of weights + begin.

    By TDPBUSD x is uint8 [row_tiles, count, 16, 64], weights are int8 [count, 16, 32, 4] and sums int32; by TDPBF16PS
    x is bfloat16 [row_tiles, count, 16, 32], weights are [count, 16, 32, 2] and sums float32. ``apart`` bytes lie
    between x's tiles of rows, ``stride`` between rows of sums. Each row begins with the 32 numbers at ``begin``, or,
    with ``add``, with the sums that are there, or, ``fresh``, with zeros.
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
    """The code of ``tile_products``; ``beside`` writes what else is done in each step, of which it gets the number."""
    x, apart, count, weights, sums, stride, begin = arguments
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
        first = places[cell] if add else at(begin, _I64(TILE_BYTES * cell[1]))
        builder.call(load, [tiles[cell], first, stride if add else _I64(0)])

    def step(number: Any, _: list[Any]) -> list[Any]:
        there = builder.add(weights, builder.mul(number, _I64(64 * BLOCK)))
        if prefetch:
            prefetch_lines(builder, there, range(_AHEAD, _AHEAD + 64 * BLOCK, 64), 3)
        here = builder.add(x, builder.mul(number, _I64(TILE_ROWS * TILE_BYTES)))
        for row in range(row_tiles):
            place = at(here, builder.mul(apart, _I64(row)))
            builder.call(load, [_I8(4 + row), place, _I64(TILE_BYTES)])
        for column in range(2):
            builder.call(load, [_I8(6 + column), at(there, _I64(64 * column)), _I64(4 * BLOCK)])
            for row in range(row_tiles):
                builder.call(product, [tiles[row, column], _I8(4 + row), _I8(6 + column)])
        if beside is not None:
            beside(number)
        return []

    loop(builder, count, [], step)
    for cell in cells:
        builder.call(store, [tiles[cell], places[cell], stride])
