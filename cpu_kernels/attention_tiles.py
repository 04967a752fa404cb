"""Prompt attention between its tile products: packing rows into tiles and back, and online softmax by blocks of keys.

Online softmax as in FlashAttention (Dao et al. 2022), with powers of two. Scores are float32 [keys, 32 rows]: each row
has a lane of its own in two vectors, so nothing is summed across lanes. Its state is float32 [4, 32]: the offset, minus
the exponent that powers are relative to; the total of the powers; the factor that rescales earlier sums to a new
offset; the last key that the row sees (int32). A block of which a row sees nothing leaves its state unchanged to the
bit, with the factor 1.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import BLOCK_OUTPUTS, TILE_BYTES, TILE_ROWS
from cpu_kernels.intrinsics import FLOATS, LANES, NUMBERS, Vector, Vectors, call_llvm, loop, void_intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)
_ROW = 4 * 2 * LANES
"""Bytes of one key's scores for 32 rows, and of one of the four arrays of the state."""
OFFSETS, TOTALS, FACTORS, LAST_KEYS = (_ROW * number for number in range(4))
STATE_SIZE = 4 * _ROW
_NOTHING_SEEN = 3.0e38
"""The offset of a row that has seen no key; minus infinity plus it is minus infinity."""
_SLACK = 8.0
"""An offset changes only where an exponent exceeds this: sums are rescaled seldom, and powers do not overflow."""
_POLYNOMIAL = (0.07705902, 0.22765374, 0.69511484, 1.0)
"""2**x for 0 <= x < 1, to 9e-5, exact at 0; bfloat16 rounds the powers to 4e-3."""


def _flush_denormals(builder: Any, flush: Any) -> None:
    """Flush denormals to zero where ``flush`` is not 0 (MXCSR, bits 6 and 15: DAZ and FTZ)."""
    pointer = ir.IntType(8).as_pointer()
    with builder.goto_entry_block():
        mxcsr = builder.alloca(_I32)
    address = builder.bitcast(mxcsr, pointer)
    for name in ("stmxcsr", "ldmxcsr"):
        if name == "ldmxcsr":
            before = builder.and_(builder.load(mxcsr), _I32(~0x8040))
            wanted = builder.select(builder.icmp_signed("!=", flush, _I64(0)), _I32(0x8040), _I32(0))
            builder.store(builder.or_(before, wanted), mxcsr)
        call_llvm(builder, f"x86.sse.{name}", ir.VoidType(), address)


def _begin(builder: Any, state: Any, first: Any, last: Any) -> None:
    vectors = Vectors(builder)
    for half in range(2):
        half_state = builder.add(state, _I64(4 * LANES * half))
        for array, number in ((OFFSETS, _NOTHING_SEEN), (TOTALS, 0.0)):
            builder.store(vectors.number(number), vectors.at(builder.add(half_state, _I64(array))), align=4)
        lanes = ir.Constant(NUMBERS, list(range(LANES * half, LANES * (half + 1))))
        keys = builder.add(lanes, vectors.all_of(builder.trunc(first, _I32)))
        last_key = vectors.all_of(builder.trunc(last, _I32))
        keys = builder.select(builder.icmp_signed("<", keys, last_key), keys, last_key)
        builder.store(keys, vectors.at(builder.add(half_state, _I64(LAST_KEYS)), NUMBERS), align=4)


def _hide(builder: Any, scores: Any, key: Any, count: Any, state: Any, window: Any) -> None:
    vectors = Vectors(builder)
    width, first = vectors.all_of(builder.trunc(window, _I32)), vectors.all_of(builder.trunc(key, _I32))
    lasts = [vectors.load(builder.add(state, _I64(LAST_KEYS + 4 * LANES * half)), NUMBERS) for half in range(2)]

    def hide_one_key(number: Any, distances: list[Any]) -> list[Any]:
        key_scores = builder.add(scores, builder.mul(number, _I64(_ROW)))
        for half, distance in enumerate(distances):
            address = builder.add(key_scores, _I64(4 * LANES * half))
            seen = builder.icmp_unsigned("<", distance, width)
            score = builder.select(seen, vectors.load(address), vectors.number(float("-inf")))
            builder.store(score, vectors.at(address), align=4)
        return [builder.sub(distance, ir.Constant(NUMBERS, [1] * LANES)) for distance in distances]

    loop(builder, count, [builder.sub(last, first) for last in lasts], hide_one_key)


def _largest(builder: Any, scores: Any, count: Any, scale: Any, state: Any, moved: Any) -> None:
    vectors = Vectors(builder)

    def largest_of_four_keys(number: Any, before: list[Any]) -> list[Any]:
        key_scores = builder.add(scores, builder.mul(number, _I64(4 * _ROW)))
        largest = list(before)
        for vector in range(8):
            score = vectors.load(builder.add(key_scores, _I64(4 * LANES * vector)))
            largest[vector % 4] = vectors.greater(score, largest[vector % 4])
        return largest

    largest = loop(builder, count, [vectors.number(float("-inf"))] * 4, largest_of_four_keys)
    factor, any_moved = vectors.repeated(scale), None
    for half in range(2):
        half_state = builder.add(state, _I64(4 * LANES * half))
        offset_pointer = vectors.at(builder.add(half_state, _I64(OFFSETS)))
        before = builder.load(offset_pointer, align=4)
        half_largest = vectors.greater(largest[half], largest[half + 2])
        wanted = builder.fsub(vectors.number(-0.0), builder.fmul(half_largest, factor))
        moves = builder.fcmp_ordered("<", wanted, builder.fsub(before, vectors.number(_SLACK)))
        offset = builder.select(moves, wanted, before)
        builder.store(offset, offset_pointer, align=4)
        change = _power(vectors, builder.fsub(offset, before))
        builder.store(change, vectors.at(builder.add(half_state, _I64(FACTORS))), align=4)
        total_pointer = vectors.at(builder.add(half_state, _I64(TOTALS)))
        builder.store(builder.fmul(builder.load(total_pointer, align=4), change), total_pointer, align=4)
        bits = builder.bitcast(moves, ir.IntType(LANES))
        any_moved = bits if any_moved is None else builder.or_(any_moved, bits)
    builder.store(builder.zext(any_moved, _I64), builder.inttoptr(moved, _I64.as_pointer()))


def _power(vectors: Vectors, x: Vector) -> Vector:
    """Two to the x, for x from minus infinity to 127."""
    r, power = vectors.fraction(x), vectors.number(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        power = vectors.multiply_add(power, r, vectors.number(coefficient))
    return vectors.scaled(power, x)


class Powers:
    """Code for powers of two of the scores of pairs of keys, as tiles bfloat16 [16, 32 rows, 2]; and their totals."""

    def __init__(self, builder: Any, scores: Any, tiles: Any, scale: Any, state: Any) -> None:
        self._builder, self._vectors = builder, Vectors(builder)
        self._scores, self._tiles = scores, tiles
        self._factor = self._vectors.repeated(scale)
        self._totals = [builder.add(state, _I64(TOTALS + 4 * LANES * half)) for half in range(2)]
        self._offsets = [self._vectors.load(builder.add(state, _I64(OFFSETS + 4 * LANES * half))) for half in range(2)]

    def begin(self) -> list[Vector]:
        return [self._vectors.number(0.0)] * 4

    def pair(self, number: Any, sums: list[Vector]) -> list[Vector]:
        """The powers of keys 2 * number and 2 * number + 1; returns the sums that include them."""
        builder, vectors = self._builder, self._vectors
        pair_scores = builder.add(self._scores, builder.mul(number, _I64(2 * _ROW)))
        tile_row = builder.add(self._tiles, builder.mul(number, _I64(_ROW)))
        after = []
        for half in range(2):
            bits = []
            for key in range(2):
                score = vectors.load(builder.add(pair_scores, _I64(_ROW * key + 4 * LANES * half)))
                power = _power(vectors, vectors.multiply_add(score, self._factor, self._offsets[half]))
                after.append(builder.fadd(sums[2 * half + key], power))
                rounding = ir.Constant(NUMBERS, [0x8000] * LANES)
                bits.append(builder.add(builder.bitcast(power, NUMBERS), rounding))
            target = vectors.at(builder.add(tile_row, _I64(4 * LANES * half)), NUMBERS)
            builder.store(vectors.upper_halves(*bits), target, align=4)
        return after

    def end(self, sums: list[Vector]) -> None:
        """Add the sums to the totals."""
        builder, vectors = self._builder, self._vectors
        for half, address in enumerate(self._totals):
            both_keys = builder.fadd(sums[2 * half], sums[2 * half + 1])
            builder.store(builder.fadd(vectors.load(address), both_keys), vectors.at(address), align=4)


def _powers(builder: Any, scores: Any, tiles: Any, scale: Any, state: Any, pairs: Any) -> None:
    powers = Powers(builder, scores, tiles, scale, state)
    powers.end(loop(builder, pairs, powers.begin(), powers.pair))


def _scale_sums(builder: Any, sums: Any, count: Any, state: Any) -> None:
    vectors = Vectors(builder)
    factors = [vectors.load(builder.add(state, _I64(FACTORS + 4 * LANES * half))) for half in range(2)]

    def scale_row(number: Any, _: list[Any]) -> list[Any]:
        row_sums = builder.add(sums, builder.mul(number, _I64(_ROW)))
        for half, factor in enumerate(factors):
            address = builder.add(row_sums, _I64(4 * LANES * half))
            builder.store(builder.fmul(vectors.load(address), factor), vectors.at(address), align=4)
        return []

    loop(builder, count, [], scale_row)


def _finish(builder: Any, state: Any) -> None:
    vectors = Vectors(builder)
    for half in range(2):
        total = vectors.load(builder.add(state, _I64(TOTALS + 4 * LANES * half)))
        factor_pointer = vectors.at(builder.add(state, _I64(FACTORS + 4 * LANES * half)))
        builder.store(builder.fdiv(vectors.number(1.0), total), factor_pointer, align=4)


flush_denormals = void_intrinsic(1, _flush_denormals)
"""``f(flush)``: this thread flushes denormals to zero from now on, or not; a denormal takes 60 times as long."""
begin_rows = void_intrinsic(3, _begin)
"""``f(state, first, last)``: start; row i sees keys up to min(``first`` + i, ``last``)."""
hide_keys = void_intrinsic(5, _hide)
"""``f(scores, key, count, state, window)``: of ``count`` keys from ``key`` on, those a row does not see get -inf."""
find_largest = void_intrinsic(5, _largest)
"""``f(scores, count, scale, state, moved)``: update offsets and factors for 4 * count keys.

``moved`` int64 is set to 0 where all factors are 1. ``scale`` float32 > 0: a score times it is an exponent of two."""
compute_powers = void_intrinsic(5, _powers)
"""``f(scores, tiles, scale, state, pairs)``: the powers of ``pairs`` pairs of keys, as ``Powers``."""
scale_sums = void_intrinsic(3, _scale_sums)
"""``f(sums, count, state)``: sums float32 [count, 32 rows] *= factors."""
finish_rows = void_intrinsic(1, _finish)
"""``f(state)``: factors = 1 / totals."""


def transposed(builder: Any, rows: list[Vector]) -> list[Vector]:
    """The transpose of 16 x 16 numbers of 32 bits: four rounds in which pairs of vectors swap ever smaller blocks."""
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
    """The address of row ``number``, or of the last row where that is less."""
    existing = builder.select(builder.icmp_signed("<", last, _I64(number)), last, _I64(number))
    return builder.add(rows, builder.mul(stride, existing))


def _pack_queries(builder: Any, rows: Any, stride: Any, last: Any, tiles: Any, steps: Any) -> None:
    vectors = Vectors(builder)
    addresses = [_row(builder, rows, stride, last, row) for row in range(2 * LANES)]

    def step(number: Any, _: list[Any]) -> list[Any]:
        offset = builder.mul(number, _I64(2 * TILE_BYTES))
        tile = builder.add(tiles, builder.mul(number, _I64(2 * TILE_ROWS * TILE_BYTES)))
        for half in range(2):
            pairs = []
            for address in addresses[LANES * half : LANES * (half + 1)]:
                first = builder.add(address, offset)
                second = builder.add(first, _I64(TILE_BYTES))
                pairs.append(vectors.rounded(vectors.load(first), vectors.load(second)))
            for pair, lanes in enumerate(transposed(builder, pairs)):
                target = builder.add(tile, _I64(2 * TILE_BYTES * pair + TILE_BYTES * half))
                builder.store(lanes, vectors.at(target, NUMBERS), align=4)
        return []

    loop(builder, steps, [], step)


def _pack_values(builder: Any, rows: Any, stride: Any, last: Any, tiles: Any, tile_stride: Any) -> None:
    vectors, halves = Vectors(builder), []
    for half in range(2):
        pairs = []
        for row in range(LANES * half, LANES * (half + 1)):
            pair = vectors.load(_row(builder, rows, stride, last, row), NUMBERS)
            exists = builder.icmp_signed("<=", _I64(row), last)
            pairs.append(builder.select(exists, pair, ir.Constant(NUMBERS, None)))
        halves.append([builder.bitcast(vector, _HALVES) for vector in transposed(builder, pairs)])
    for pair, (first, second) in enumerate(zip(*halves, strict=True)):
        for odd in range(2):
            lanes = ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(odd, 4 * LANES, 2)))
            dim = 2 * pair + odd
            tile = builder.add(tiles, builder.mul(tile_stride, _I64(dim // TILE_ROWS)))
            target = vectors.at(builder.add(tile, _I64(dim % TILE_ROWS * TILE_BYTES)), _HALVES)
            builder.store(builder.shuffle_vector(first, second, lanes), target, align=4)


def _unpack_sums(builder: Any, sums: Any, factors: Any, rows: Any, stride: Any, last: Any, steps: Any) -> None:
    vectors = Vectors(builder)
    addresses = [_row(builder, rows, stride, last, row) for row in range(2 * LANES)]

    def step(number: Any, _: list[Any]) -> list[Any]:
        offset = builder.mul(number, _I64(4 * LANES))
        step_sums = builder.add(sums, builder.mul(number, _I64(4 * BLOCK_OUTPUTS * LANES)))
        for half in range(2):
            factor = vectors.load(builder.add(factors, _I64(4 * LANES * half)))
            lanes = []
            for dim in range(LANES):
                values = vectors.load(builder.add(step_sums, _I64(4 * BLOCK_OUTPUTS * dim + 4 * LANES * half)))
                lanes.append(builder.fmul(values, factor))
            for address, row in zip(addresses[LANES * half :], transposed(builder, lanes), strict=False):
                builder.store(row, vectors.at(builder.add(address, offset), FLOATS), align=4)
        return []

    loop(builder, steps, [], step)


pack_queries = void_intrinsic(5, _pack_queries)
"""``f(rows, stride, last, tiles, steps)``: float32 [32, 32 * steps] -> bfloat16 [steps, 16, 32 rows, 2].

Here and below, ``stride`` is the bytes from row to row; rows after ``last`` repeat it."""
pack_values = void_intrinsic(5, _pack_values)
"""``f(rows, stride, last, tiles, tile_stride)``: bfloat16 [32, 32] -> two tiles [16, 32 rows].

``tile_stride``: bytes from one tile to the next.

Rows after ``last`` are zeros."""
unpack_sums = void_intrinsic(6, _unpack_sums)
"""``f(sums, factors, rows, stride, last, steps)``: float32 [16 * steps, 32] times factors [32] -> [32, 16 * steps]."""
