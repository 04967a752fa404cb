"""What compiled routines call that Python has no word for: memory by its address, threads, products of vectors.

Importing this needs Numba; only modules of routines do.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LANES = 16
_F32, _FLOATS = ir.FloatType(), ir.VectorType(ir.FloatType(), _LANES)
_BLOCK = 64
"""Outputs of a block of weights: ``product.py``."""

_ARCH_PRCTL = (158, 0x1023, 18)
"""The number of the system call on x86-64, ARCH_REQ_XCOMP_PERM, and XTILEDATA."""

_AHEAD_OF_DOTS, _AHEAD_OF_TILES = 4096, 8192
"""Bytes that weights are called into the caches ahead of the products, where they come from memory; measured."""

thread_number: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads: Any = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier: Any = types.ExternalFunction("GOMP_barrier", types.void())


def has_features(*names: str) -> bool:
    """Whether this CPU has extensions, by LLVM's names."""
    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in names)


@cache
def may_use_tiles() -> bool:
    """Ask Linux for the registers of AMX, which a process has only then."""
    return platform.machine() == "x86_64" and ctypes.CDLL(None).syscall(*_ARCH_PRCTL) == 0


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(_typing: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(element)))

        return types.CPointer(element)(types.int64), generate

    return pointer


floats = _pointer_to(types.float32)
integers = _pointer_to(types.int32)
halves = _pointer_to(types.int16)
longs = _pointer_to(types.int64)
bytes_at = _pointer_to(types.uint8)


def _same_bits(source: Any, target: Any) -> Any:
    @intrinsic
    def cast(_typing: Any, _number: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return cast


bits_of = _same_bits(types.float32, types.int32)
float_of = _same_bits(types.int32, types.float32)


def scratch(num_bytes: int) -> Any:
    """A function that gives the address of so many bytes of the thread's stack."""

    @intrinsic
    def make(_typing: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
            with builder.goto_entry_block():
                array = builder.alloca(ir.ArrayType(_I8, num_bytes))
            array.align = 64
            return builder.ptrtoint(array, _I64)

        return types.int64(), generate

    return make


def _void_intrinsic(num_arguments: int, generate: Callable[..., None]) -> Any:
    """A function of so many addresses and counts that ``generate`` writes with a builder."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        generate(builder, *arguments)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * num_arguments)
    typings: dict[int, Callable[..., Any]] = {  # Numba reads the number of arguments off the function
        0: lambda _typing: (signature, code),
        2: lambda _typing, _a, _b: (signature, code),
        4: lambda _typing, _a, _b, _c, _d: (signature, code),
        5: lambda _typing, _a, _b, _c, _d, _e: (signature, code),
    }
    return intrinsic(typings[num_arguments])


def _call(builder: Any, code: Any, record: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_I64])
    builder.call(builder.inttoptr(code, kind.as_pointer()), [record])


call = _void_intrinsic(2, _call)
"""``f(code, record)``: call a routine's code with the address of its record."""


def dot_products(rows: int, bits: int, *, prefetch: bool = False) -> Any:
    """``f(x, stride, count, weights, sums)``: sums int32 [rows, 64] += x uint8 [rows, 4 * count] @ a block of weights.

    By VPDPBUSD on vectors of so many bits. ``weights`` int8 [count, 64, 4]; ``stride`` bytes lie between rows of x.
    """
    lanes = bits // 32
    per_block = _BLOCK // lanes
    num_registers = (32 if bits == 512 else 16) - 4
    at_once = min(per_block, max(1, num_registers // rows))
    while per_block % at_once:
        at_once -= 1

    def generate(builder: Any, x: Any, stride: Any, count: Any, weights: Any, sums: Any) -> None:
        for first in range(0, per_block, at_once):
            ahead = _AHEAD_OF_DOTS if prefetch else 0
            _dot_products(builder, rows, lanes, range(first, first + at_once), ahead, (x, stride, count, weights, sums))

    return _void_intrinsic(5, generate)


def _dot_products(builder: Any, rows: int, lanes: int, vectors: range, ahead: int, arguments: Any) -> None:
    x, stride, count, weights, sums = arguments
    numbers, octets = ir.VectorType(_I32, lanes), ir.VectorType(_I8, 4 * lanes)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    product = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(numbers, [numbers, octets, octets]), name
    )

    def at(address: Any, offset: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    def sum_at(row: int, vector: int) -> Any:
        return at(sums, _I64(4 * (_BLOCK * row + lanes * vector)), numbers)

    cells = [(row, vector) for row in range(rows) for vector in vectors]
    begin = {cell: builder.load(sum_at(*cell), align=4) for cell in cells}
    before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(_I64(0), before)
    current = {cell: builder.phi(numbers) for cell in cells}
    here = builder.add(weights, builder.mul(step, _I64(4 * _BLOCK)))
    loaded = {one: builder.load(at(here, _I64(4 * lanes * one), octets), align=1) for one in vectors}
    if ahead:
        _prefetch(builder, here, range(ahead + 4 * lanes * vectors[0], ahead + 4 * lanes * (vectors[-1] + 1), 64), 2)
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


_TILES_CONFIGURED = bytes([1, 0, *[0] * 14, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])
"""All eight tiles with 16 rows of 64 bytes (Intel SDM, LDTILECFG)."""


def _tile_function(builder: Any, name: str, *kinds: Any) -> Any:
    whole = f"llvm.x86.{name}"
    known = builder.module.globals.get(whole)
    return known or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), kinds), whole)


def _configure(builder: Any) -> None:
    kind = ir.ArrayType(_I8, len(_TILES_CONFIGURED))
    with builder.goto_entry_block():
        config = builder.alloca(kind)
    builder.store(ir.Constant(kind, bytearray(_TILES_CONFIGURED)), config)
    pointer = builder.bitcast(config, _I8.as_pointer())
    builder.call(_tile_function(builder, "ldtilecfg", _I8.as_pointer()), [pointer])


def _release(builder: Any) -> None:
    builder.call(_tile_function(builder, "tilerelease"), [])


configure_tiles = _void_intrinsic(0, _configure)
release_tiles = _void_intrinsic(0, _release)


def tile_products(row_tiles: int, column_tiles: int, *, prefetch: bool = False) -> Any:
    """``f(x, stride, count, weights, sums)``: sums int32 [16 * row_tiles, 64] = x uint8 [.., 64 * count] @ a block.

    By TDPBUSD; ``count`` steps of 64 inputs. The columns are taken ``column_tiles`` times 16 at once.
    """
    assert row_tiles * column_tiles + row_tiles + 1 <= 8

    def generate(builder: Any, x: Any, stride: Any, count: Any, weights: Any, sums: Any) -> None:
        for first in range(0, 4, column_tiles):
            columns = range(first, first + column_tiles)
            _tile_products(builder, row_tiles, columns, prefetch, (x, stride, count, weights, sums))

    return _void_intrinsic(5, generate)


def _tile_products(builder: Any, row_tiles: int, columns: range, prefetch: bool, arguments: Any) -> None:
    x, stride, count, weights, sums = arguments
    pointer = _I8.as_pointer()
    zero = _tile_function(builder, "tilezero", _I8)
    load = _tile_function(builder, "tileloadd64", _I8, pointer, _I64)
    store = _tile_function(builder, "tilestored64", _I8, pointer, _I64)
    product = _tile_function(builder, "tdpbusd", _I8, _I8, _I8)

    def at(address: Any, offset: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), pointer)

    def sum_tile(row: int, number: int) -> Any:
        return _I8(row * len(columns) + number)

    first_x = row_tiles * len(columns)
    for row in range(row_tiles):
        for number in range(len(columns)):
            builder.call(zero, [sum_tile(row, number)])
    before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(_I64(0), before)
    here = builder.add(weights, builder.mul(step, _I64(64 * _BLOCK)))
    if prefetch:
        _prefetch(builder, here, range(_AHEAD_OF_TILES, _AHEAD_OF_TILES + 64 * _BLOCK, 64), 3)
    for row in range(row_tiles):
        offset = builder.add(builder.mul(stride, _I64(16 * row)), builder.mul(step, _I64(64)))
        builder.call(load, [_I8(first_x + row), at(x, offset), stride])
    for number, column in enumerate(columns):
        tile = _I8(first_x + row_tiles + number % (8 - first_x - row_tiles))
        builder.call(load, [tile, at(here, _I64(64 * column)), _I64(4 * _BLOCK)])
        for row in range(row_tiles):
            builder.call(product, [sum_tile(row, number), _I8(first_x + row), tile])
    following = builder.add(step, _I64(1))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    for row in range(row_tiles):
        for number, column in enumerate(columns):
            offset = _I64(4 * (_BLOCK * 16 * row + 16 * column))
            builder.call(store, [sum_tile(row, number), at(sums, offset), _I64(4 * _BLOCK)])


def _prefetch(builder: Any, here: Any, offsets: range, level: int) -> None:
    """Call lines of 64 bytes into the first cache (level 3) or the second (2)."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    name = "llvm.prefetch.p0"
    prefetch = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    for offset in offsets:
        address = builder.inttoptr(builder.add(here, _I64(offset)), _I8.as_pointer())
        builder.call(prefetch, [address, _I32(0), _I32(level), _I32(1)])


def _loop(builder: Any, count: Any, begin: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """``values = body(number, values)`` for number 0 to count, which is at least 1; the values after the last."""
    before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    number = builder.phi(_I64)
    number.add_incoming(_I64(0), before)
    current = [builder.phi(value.type) for value in begin]
    after = body(number, current)
    last, following = builder.block, builder.add(number, _I64(1))
    number.add_incoming(following, last)
    for phi, first, new in zip(current, begin, after, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(new, last)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    return after


def _vector_at(builder: Any, address: Any, offset: Any) -> Any:
    return builder.load(builder.inttoptr(builder.add(address, offset), _FLOATS.as_pointer()), align=4)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    name = "llvm.fma.v16f32"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), name
    )
    return builder.call(function, [a, b, c])


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, _LANES), lanes))


def _dots(num: int, builder: Any, x: Any, rows: Any, count: Any, out: Any) -> None:
    """Every dot is added up in the same order, however many there are."""
    width = builder.mul(count, _I64(4 * _LANES))
    zeros = [ir.Constant(_FLOATS, None) for _ in range(num)]

    def step(number: Any, sums: list[Any]) -> list[Any]:
        offset = builder.mul(number, _I64(4 * _LANES))
        here = _vector_at(builder, x, offset)
        places = [builder.add(offset, builder.mul(width, _I64(row))) for row in range(num)]
        return [
            _multiply_add(builder, here, _vector_at(builder, rows, place), one)
            for place, one in zip(places, sums, strict=True)
        ]

    sums = _loop(builder, count, zeros, step) * (_LANES // num)
    distance = _LANES // 2
    while distance:  # pairs of vectors add up their halves side by side
        low = [lane for lane in range(_LANES) if not lane & distance]
        merged = []
        for first, second in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True):
            here = [lane if not lane & distance else lane + _LANES - distance for lane in range(_LANES)]
            there = [lane + distance if lane in low else lane + _LANES for lane in range(_LANES)]
            low_half, high_half = (_shuffled(builder, first, second, lanes) for lanes in (here, there))
            merged.append(builder.fadd(low_half, high_half))
        sums, distance = merged, distance // 2
    kind = ir.VectorType(_F32, num)
    first = builder.shuffle_vector(sums[0], sums[0], ir.Constant(ir.VectorType(_I32, num), list(range(num))))
    builder.store(first, builder.inttoptr(out, kind.as_pointer()), align=4)


def dots(num: int) -> Any:
    """``f(x, rows, count, out)``: out float32 [num] = rows [num, 16 * count] @ x [16 * count]; num is 1, 4 or 16."""
    return _void_intrinsic(4, partial(_dots, num))


def weighted_sum(vectors: int, num_rows: int = _LANES) -> Any:
    """``f(weights, rows, width, out)``: out float32 [16 * vectors] += weights [num_rows] @ rows [num_rows, width].

    Of the beginnings of these rows, one row after another.
    """

    def generate(builder: Any, weights: Any, rows: Any, width: Any, out: Any) -> None:
        stride = builder.mul(width, _I64(4))
        places = [_I64(4 * _LANES * one) for one in range(vectors)]
        sums = [_vector_at(builder, out, place) for place in places]
        for row in range(num_rows):
            four = builder.load(builder.inttoptr(builder.add(weights, _I64(4 * row)), _F32.as_pointer()), align=4)
            single = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), four, _I32(0))
            weight = _shuffled(builder, single, single, [0] * _LANES)
            here = builder.add(rows, builder.mul(stride, _I64(row)))
            sums = [
                _multiply_add(builder, weight, _vector_at(builder, here, place), one)
                for place, one in zip(places, sums, strict=True)
            ]
        for place, one in zip(places, sums, strict=True):
            builder.store(one, builder.inttoptr(builder.add(out, place), _FLOATS.as_pointer()), align=4)

    return _void_intrinsic(4, generate)
