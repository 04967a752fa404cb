"""The block types of GGUF tensors, decoded to float32.

A block is so many elements in so many bytes: small integers, and scales (and offsets) that several of them share. The
layouts are ggml's (ggml-common.h, the structs ``block_*``), the order of operations is that of ``gguf.quants``, so that
results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.mxfp4 import DOUBLED_VALUES, HALF_SCALES

PIECE_ELEMENTS = 1 << 17
"""Decoded at once: codes, floats and temporaries stay in a core's cache."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """How elements are packed. ``decode`` takes bytes [blocks, num_bytes] and fills floats [blocks, elements]."""

    name: str
    elements: int
    num_bytes: int
    decode: Callable[[Bytes, Floats], object]


def dequantize(block_type: BlockType, data: Any, out: Floats) -> None:
    """Decode whole blocks in a buffer into the contiguous ``out`` [elements]. Scales may be infinite or NaN."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, block_type.num_bytes)
    floats = out.reshape(len(blocks), block_type.elements)
    step = max(1, PIECE_ELEMENTS // block_type.elements)
    with np.errstate(invalid="ignore", over="ignore"):
        for begin in range(0, len(blocks), step):
            block_type.decode(blocks[begin : begin + step], floats[begin : begin + step])


def _fields(packed: Bytes, bits: int, group: int) -> Bytes:
    """Bytes [blocks, n * group] as codes [blocks, n * 8 // bits * group].

    Of each group of bytes, the lowest bits make the first codes, the next bits the next ones.
    """
    groups = packed.reshape(len(packed), -1, group)
    codes = np.empty((len(packed), groups.shape[1], 8 // bits, group), np.uint8)
    for place in range(8 // bits):
        np.right_shift(groups, place * bits, out=codes[:, :, place])
    codes &= (1 << bits) - 1
    return codes.reshape(len(packed), -1)


def _float16(blocks: Bytes, at: int) -> Floats:
    """The float16 at a byte of each block, float32 [blocks, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _signed(codes: Bytes, offset: int) -> NDArray[np.int8]:
    codes -= np.uint8(offset)
    return codes.view(np.int8)


def _scaled(codes: NDArray[Any], scales: Floats, out: Floats) -> Floats:
    """``scales`` [blocks, n] times codes [blocks, n * elements of each], into ``out``, and that as groups."""
    groups = out.reshape(*scales.shape, -1)
    np.multiply(scales[..., None], codes.reshape(groups.shape), out=groups)
    return groups


def _f32(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f4")


def _f16(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f2")


def _bf16(blocks: Bytes, out: Floats) -> None:
    np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    _scaled(_signed(_fields(blocks[:, 2:], 4, 16), 8), _float16(blocks, 0), out)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    out = _scaled(_fields(blocks[:, 4:], 4, 16), _float16(blocks, 0), out)
    out += _float16(blocks, 2)[..., None]


def _q5_0(blocks: Bytes, out: Floats) -> None:
    _scaled(_signed(_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16), _float16(blocks, 0), out)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    out = _scaled(_five_bits(blocks[:, 4:8], blocks[:, 8:]), _float16(blocks, 0), out)
    out += _float16(blocks, 2)[..., None]


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    codes = np.unpackbits(high, axis=1, bitorder="little")
    codes <<= 4
    codes |= _fields(low, 4, 16)
    return codes


def _q8_0(blocks: Bytes, out: Floats) -> None:
    _scaled(blocks[:, 2:].view(np.int8), _float16(blocks, 0), out)


def _q2_k(blocks: Bytes, out: Floats) -> None:
    scales = _float16(blocks, 80) * (blocks[:, :16] & 15)
    offsets = _float16(blocks, 82) * (blocks[:, :16] >> 4)
    out = _scaled(_fields(blocks[:, 16:80], 2, 32), scales, out)
    out -= offsets[..., None]


def _q3_k(blocks: Bytes, out: Floats) -> None:
    """The high bit's meaning is turned round: where it is 0, 4 is subtracted."""
    scales = _fields(blocks[:, 96:104], 4, 8)
    scales |= _fields(blocks[:, 104:108], 2, 4) << 4
    codes = _fields(blocks[:, :32], 1, 32)
    codes <<= 2
    codes |= _fields(blocks[:, 32:96], 2, 32)
    _scaled(_signed(codes, 4), _float16(blocks, 108) * _signed(scales, 32), out)


def _q4_k(blocks: Bytes, out: Floats) -> None:
    scales, offsets = _scales_and_offsets(blocks)
    out = _scaled(_fields(blocks[:, 16:], 4, 32), scales, out)
    out -= offsets


def _q5_k(blocks: Bytes, out: Floats) -> None:
    scales, offsets = _scales_and_offsets(blocks)
    codes = _fields(blocks[:, 16:48], 1, 32)
    codes <<= 4
    codes |= _fields(blocks[:, 48:], 4, 32)
    out = _scaled(codes, scales, out)
    out -= offsets


def _scales_and_offsets(blocks: Bytes) -> tuple[Floats, Floats]:
    """Of Q4_K and Q5_K, float32 [blocks, 8] and [blocks, 8, 1]: float16s times 6-bit integers.

    Of the integers' 12 bytes, four hold a scale each and four an offset each, in their lower 6 bits; the last four hold
    the lower halves of the other scales and offsets, whose upper two bits are those left in the first eight bytes.
    """
    scales, offsets, low = (blocks[:, at : at + 4] for at in (4, 8, 12))
    all_scales = np.concatenate([scales & 63, (low & 15) | (scales >> 2 & 48)], axis=1)
    all_offsets = np.concatenate([offsets & 63, (low >> 4) | (offsets >> 2 & 48)], axis=1)
    return _float16(blocks, 0) * all_scales, (_float16(blocks, 2) * all_offsets)[..., None]


def _q6_k(blocks: Bytes, out: Floats) -> None:
    codes = _fields(blocks[:, 128:192], 2, 32)
    codes <<= 4
    codes |= _fields(blocks[:, :128], 4, 64)
    _scaled(_signed(codes, 32), _float16(blocks, 208) * blocks[:, 192:208].view(np.int8), out)


_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)  # ggml's kvalues_iq4nl


def _iq4_nl(blocks: Bytes, out: Floats) -> None:
    _scaled(np.take(_IQ4_VALUES, _fields(blocks[:, 2:], 4, 16)), _float16(blocks, 0), out)


def _iq4_xs(blocks: Bytes, out: Floats) -> None:
    scales = _fields(blocks[:, 4:8], 4, 1)
    scales |= _fields(blocks[:, 2:4], 2, 1) << 4
    values = np.take(_IQ4_VALUES, _fields(blocks[:, 8:], 4, 16))
    _scaled(values, _float16(blocks, 0) * _signed(scales, 32), out)


def _mxfp4(blocks: Bytes, out: Floats) -> None:
    _scaled(np.take(DOUBLED_VALUES, _fields(blocks[:, 1:], 4, 16)), np.take(HALF_SCALES, blocks[:, :1]), out)


BLOCK_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4, _f32),
    1: BlockType("F16", 1, 2, _f16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    30: BlockType("BF16", 1, 2, _bf16),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}
"""Types that are read, by ggml's number for them (``enum ggml_type``)."""

UNREAD_TYPES: Mapping[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Names of the others."""
