"""Between the tile products of prompt attention: rows packed into tiles and back, softmax block by block of keys.

Scores lie key by key, [keys, 32 rows]. A row has a lane of its own in two vectors, so nothing is added up across lanes.
What has been seen of its keys is its state, float32 [4, 32]: an offset, minus the exponent of two that its powers are
taken relative to; their total; the factor which makes what was summed before relative to a new offset; and the last key
that it sees, an int32. A block of which a row sees nothing leaves its state as it is, to the bit, and has the factor 1.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import BLOCK_OUTPUTS, TILE_BYTES, TILE_ROWS
from cpu_kernels.intrinsics import FLOATS, LANES, NUMBERS, Vector, Vectors, call_llvm, loop, void_intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)
_ROW = 4 * 2 * LANES
"""Bytes of a key's scores, and of a row of the state."""
OFFSETS, TOTALS, FACTORS, LAST_KEYS = (_ROW * number for number in range(4))
STATE_SIZE = 4 * _ROW
_BEYOND = 3.0e38
"""The offset where nothing was seen; minus infinity plus it is still so."""
_SLACK = 8.0
"""An offset stays while no exponent is above this: the sums so far need no new factor, and powers do not overflow."""
_POLYNOMIAL = (0.07705902, 0.22765374, 0.69511484, 1.0)
"""Of two to the x from 0 to 1, exact to 9e-5, and at 0 exact; the powers are rounded to 4e-3."""


def _flush_denormals(builder: Any, flush: Any) -> None:
    """Set what the CPU does to numbers below 2**-126 (MXCSR, bits 6 and 15)."""
    pointer = ir.IntType(8).as_pointer()
    with builder.goto_entry_block():
        place = builder.alloca(_I32)
    address = builder.bitcast(place, pointer)
    for name in ("stmxcsr", "ldmxcsr"):
        if name == "ldmxcsr":
            before = builder.and_(builder.load(place), _I32(~0x8040))
            wanted = builder.select(builder.icmp_signed("!=", flush, _I64(0)), _I32(0x8040), _I32(0))
            builder.store(builder.or_(before, wanted), place)
        call_llvm(builder, f"x86.sse.{name}", ir.VoidType(), address)


def _begin(builder: Any, state: Any, first: Any, last: Any) -> None:
    vectors = Vectors(builder)
    for half in range(2):
        here = builder.add(state, _I64(4 * LANES * half))
        for row, number in ((OFFSETS, _BEYOND), (TOTALS, 0.0)):
            builder.store(vectors.number(number), vectors.at(builder.add(here, _I64(row))), align=4)
        lanes = ir.Constant(NUMBERS, list(range(LANES * half, LANES * (half + 1))))
        keys = builder.add(lanes, vectors.all_of(builder.trunc(first, _I32)))
        most = vectors.all_of(builder.trunc(last, _I32))
        keys = builder.select(builder.icmp_signed("<", keys, most), keys, most)
        builder.store(keys, vectors.at(builder.add(here, _I64(LAST_KEYS)), NUMBERS), align=4)


def _hide(builder: Any, scores: Any, key: Any, count: Any, state: Any, window: Any) -> None:
    vectors = Vectors(builder)
    width, first = vectors.all_of(builder.trunc(window, _I32)), vectors.all_of(builder.trunc(key, _I32))
    lasts = [vectors.load(builder.add(state, _I64(LAST_KEYS + 4 * LANES * half)), NUMBERS) for half in range(2)]

    def one(number: Any, distances: list[Any]) -> list[Any]:
        here = builder.add(scores, builder.mul(number, _I64(_ROW)))
        for half, distance in enumerate(distances):
            place = builder.add(here, _I64(4 * LANES * half))
            seen = builder.icmp_unsigned("<", distance, width)
            score = builder.select(seen, vectors.load(place), vectors.number(float("-inf")))
            builder.store(score, vectors.at(place), align=4)
        return [builder.sub(distance, ir.Constant(NUMBERS, [1] * LANES)) for distance in distances]

    loop(builder, count, [builder.sub(last, first) for last in lasts], one)


def _largest(builder: Any, scores: Any, count: Any, scale: Any, state: Any, moved: Any) -> None:
    vectors = Vectors(builder)

    def four(number: Any, found: list[Any]) -> list[Any]:
        here, most = builder.add(scores, builder.mul(number, _I64(4 * _ROW))), list(found)
        for row in range(8):
            score = vectors.load(builder.add(here, _I64(4 * LANES * row)))
            most[row % 4] = vectors.greater(score, most[row % 4])
        return most

    found = loop(builder, count, [vectors.number(float("-inf"))] * 4, four)
    factor, any_moved = vectors.repeated(scale), None
    for half in range(2):
        here = builder.add(state, _I64(4 * LANES * half))
        place = vectors.at(builder.add(here, _I64(OFFSETS)))
        before = builder.load(place, align=4)
        most = vectors.greater(found[half], found[half + 2])
        wanted = builder.fsub(vectors.number(-0.0), builder.fmul(most, factor))
        moves = builder.fcmp_ordered("<", wanted, builder.fsub(before, vectors.number(_SLACK)))
        offset = builder.select(moves, wanted, before)
        builder.store(offset, place, align=4)
        change = _power(vectors, builder.fsub(offset, before))
        builder.store(change, vectors.at(builder.add(here, _I64(FACTORS))), align=4)
        place = vectors.at(builder.add(here, _I64(TOTALS)))
        builder.store(builder.fmul(builder.load(place, align=4), change), place, align=4)
        bits = builder.bitcast(moves, ir.IntType(LANES))
        any_moved = bits if any_moved is None else builder.or_(any_moved, bits)
    builder.store(builder.zext(any_moved, _I64), builder.inttoptr(moved, _I64.as_pointer()))


def _power(vectors: Vectors, x: Vector) -> Vector:
    """Two to the x, from minus infinity to 127."""
    r, power = vectors.fraction(x), vectors.number(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        power = vectors.multiply_add(power, r, vectors.number(coefficient))
    return vectors.scaled(power, x)


class Powers:
    """Code for powers of two of pairs of keys' scores, as bfloat16 [16, 32 rows, 2] in tiles; and their totals."""

    def __init__(self, builder: Any, scores: Any, tiles: Any, scale: Any, state: Any) -> None:
        self._builder, self._vectors = builder, Vectors(builder)
        self._scores, self._tiles = scores, tiles
        self._factor = self._vectors.repeated(scale)
        self._totals = [builder.add(state, _I64(TOTALS + 4 * LANES * half)) for half in range(2)]
        self._offsets = [self._vectors.load(builder.add(state, _I64(OFFSETS + 4 * LANES * half))) for half in range(2)]

    def begin(self) -> list[Vector]:
        """Sums of nothing."""
        return [self._vectors.number(0.0)] * 4

    def pair(self, number: Any, sums: list[Vector]) -> list[Vector]:
        """Of keys 2 * number and the next; the sums with them."""
        builder, vectors = self._builder, self._vectors
        here = builder.add(self._scores, builder.mul(number, _I64(2 * _ROW)))
        there = builder.add(self._tiles, builder.mul(number, _I64(_ROW)))
        after = []
        for half in range(2):
            bits = []
            for key in range(2):
                score = vectors.load(builder.add(here, _I64(_ROW * key + 4 * LANES * half)))
                power = _power(vectors, vectors.multiply_add(score, self._factor, self._offsets[half]))
                after.append(builder.fadd(sums[2 * half + key], power))
                nearest = ir.Constant(NUMBERS, [0x8000] * LANES)
                bits.append(builder.add(builder.bitcast(power, NUMBERS), nearest))
            place = vectors.at(builder.add(there, _I64(4 * LANES * half)), NUMBERS)
            builder.store(vectors.upper_halves(*bits), place, align=4)
        return after

    def end(self, sums: list[Vector]) -> None:
        """Add the sums to the totals."""
        builder, vectors = self._builder, self._vectors
        for half, place in enumerate(self._totals):
            whole = builder.fadd(sums[2 * half], sums[2 * half + 1])
            builder.store(builder.fadd(vectors.load(place), whole), vectors.at(place), align=4)


def _powers(builder: Any, scores: Any, tiles: Any, scale: Any, state: Any, pairs: Any) -> None:
    powers = Powers(builder, scores, tiles, scale, state)
    powers.end(loop(builder, pairs, powers.begin(), powers.pair))


def _scale_sums(builder: Any, sums: Any, count: Any, state: Any) -> None:
    vectors = Vectors(builder)
    factors = [vectors.load(builder.add(state, _I64(FACTORS + 4 * LANES * half))) for half in range(2)]

    def one(number: Any, _: list[Any]) -> list[Any]:
        here = builder.add(sums, builder.mul(number, _I64(_ROW)))
        for half, factor in enumerate(factors):
            place = builder.add(here, _I64(4 * LANES * half))
            builder.store(builder.fmul(vectors.load(place), factor), vectors.at(place), align=4)
        return []

    loop(builder, count, [], one)


def _finish(builder: Any, state: Any) -> None:
    vectors = Vectors(builder)
    for half in range(2):
        total = vectors.load(builder.add(state, _I64(TOTALS + 4 * LANES * half)))
        place = vectors.at(builder.add(state, _I64(FACTORS + 4 * LANES * half)))
        builder.store(builder.fdiv(vectors.number(1.0), total), place, align=4)


flush_denormals = void_intrinsic(1, _flush_denormals)
"""``f(flush)``: powers below 2**-126 are 0 on this thread from now on, or are not; each would take 60 times as long."""
begin_rows = void_intrinsic(3, _begin)
"""``f(state, first, last)``: the first row sees keys up to ``first``, each row one more, but none beyond ``last``."""
hide_keys = void_intrinsic(5, _hide)
"""``f(scores, key, count, state, window)``: minus infinity where rows do not see so many keys from ``key`` on."""
find_largest = void_intrinsic(5, _largest)
"""``f(scores, count, scale, state, moved)``: offsets and factors for 4 * count keys; ``moved`` int64: not all are 1.

``scale`` float32, above 0, makes a score an exponent of two."""
compute_powers = void_intrinsic(5, _powers)
"""``f(scores, tiles, scale, state, pairs)``: powers of so many pairs of keys, as ``Powers``."""
scale_sums = void_intrinsic(3, _scale_sums)
"""``f(sums, count, state)``: sums float32 [count, 32 rows] times the factors."""
finish_rows = void_intrinsic(1, _finish)
"""``f(state)``: factors become one over totals."""


def transposed(builder: Any, rows: list[Vector]) -> list[Vector]:
    """Sixteen vectors of sixteen numbers of 32 bits; pairs of them swap ever smaller parts."""
    distance = LANES // 2
    while distance:
        low = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        high = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        swapped = list(rows)
        for row in range(LANES):
            if not row & distance:
                pair = rows[row], rows[row + distance]
                swapped[row] = builder.shuffle_vector(*pair, ir.Constant(NUMBERS, low))
                swapped[row + distance] = builder.shuffle_vector(*pair, ir.Constant(NUMBERS, high))
        rows, distance = swapped, distance // 2
    return rows


def _row(builder: Any, rows: Any, stride: Any, last: Any, number: int) -> Any:
    """The address of a row, that of the last for those behind it."""
    there = builder.select(builder.icmp_signed("<", last, _I64(number)), last, _I64(number))
    return builder.add(rows, builder.mul(stride, there))


def _pack_queries(builder: Any, rows: Any, stride: Any, last: Any, tiles: Any, steps: Any) -> None:
    vectors = Vectors(builder)
    places = [_row(builder, rows, stride, last, row) for row in range(2 * LANES)]

    def step(number: Any, _: list[Any]) -> list[Any]:
        offset = builder.mul(number, _I64(2 * TILE_BYTES))
        tile = builder.add(tiles, builder.mul(number, _I64(2 * TILE_ROWS * TILE_BYTES)))
        for half in range(2):
            pairs = []
            for place in places[LANES * half : LANES * (half + 1)]:
                here = builder.add(place, offset)
                pairs.append(vectors.rounded(vectors.load(here), vectors.load(builder.add(here, _I64(TILE_BYTES)))))
            for pair, lanes in enumerate(transposed(builder, pairs)):
                there = builder.add(tile, _I64(2 * TILE_BYTES * pair + TILE_BYTES * half))
                builder.store(lanes, vectors.at(there, NUMBERS), align=4)
        return []

    loop(builder, steps, [], step)


def _pack_values(builder: Any, rows: Any, stride: Any, last: Any, tiles: Any, tile_stride: Any) -> None:
    vectors, halves = Vectors(builder), []
    for half in range(2):
        pairs = []
        for row in range(LANES * half, LANES * (half + 1)):
            pair = vectors.load(_row(builder, rows, stride, last, row), NUMBERS)
            there = builder.icmp_signed("<=", _I64(row), last)
            pairs.append(builder.select(there, pair, ir.Constant(NUMBERS, None)))
        halves.append([builder.bitcast(one, _HALVES) for one in transposed(builder, pairs)])
    for pair, (first, second) in enumerate(zip(*halves, strict=True)):
        for odd in range(2):
            lanes = ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(odd, 4 * LANES, 2)))
            dim = 2 * pair + odd
            tile = builder.add(tiles, builder.mul(tile_stride, _I64(dim // TILE_ROWS)))
            there = vectors.at(builder.add(tile, _I64(dim % TILE_ROWS * TILE_BYTES)), _HALVES)
            builder.store(builder.shuffle_vector(first, second, lanes), there, align=4)


def _unpack_sums(builder: Any, sums: Any, factors: Any, rows: Any, stride: Any, last: Any, steps: Any) -> None:
    vectors = Vectors(builder)
    places = [_row(builder, rows, stride, last, row) for row in range(2 * LANES)]

    def step(number: Any, _: list[Any]) -> list[Any]:
        offset = builder.mul(number, _I64(4 * LANES))
        here = builder.add(sums, builder.mul(number, _I64(4 * BLOCK_OUTPUTS * LANES)))
        for half in range(2):
            factor = vectors.load(builder.add(factors, _I64(4 * LANES * half)))
            lanes = []
            for dim in range(LANES):
                one = vectors.load(builder.add(here, _I64(4 * BLOCK_OUTPUTS * dim + 4 * LANES * half)))
                lanes.append(builder.fmul(one, factor))
            for place, row in zip(places[LANES * half :], transposed(builder, lanes), strict=False):
                builder.store(row, vectors.at(builder.add(place, offset), FLOATS), align=4)
        return []

    loop(builder, steps, [], step)


pack_queries = void_intrinsic(5, _pack_queries)
"""``f(rows, stride, last, tiles, steps)``: float32 [32, 32 * steps] -> bfloat16 [steps, 16, 32 rows, 2].

In these three, ``stride`` bytes lie between rows, and rows behind the last are taken for it."""
pack_values = void_intrinsic(5, _pack_values)
"""``f(rows, stride, last, tiles, tile_stride)``: bfloat16 [32, 32] -> two tiles [16, 32 rows], ``tile_stride`` bytes
from one to the next.

Rows behind the last are zeros."""
unpack_sums = void_intrinsic(6, _unpack_sums)
"""``f(sums, factors, rows, stride, last, steps)``: float32 [16 * steps, 32] times factors [32] -> [32, 16 * steps]."""
