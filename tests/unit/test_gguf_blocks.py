"""GGUF's block types: floats are to the bit what gguf's own ``dequantize`` makes of random blocks, whole or by rows."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from base_files.gguf.blocks import BLOCK_TYPES, PIECE_ELEMENTS, UNREAD_TYPES, BlockType, dequantize
from base_files.gguf.file import read_gguf
from base_files.mxfp4 import DOUBLED_VALUES, HALF_SCALES
from base_files.tensors import StoredTensor
from tests.unit.gguf_files import container, tensor

BY_NAME = {block_type.name: block_type for block_type in BLOCK_TYPES.values()}


def random_blocks(name: str, num_elements: int) -> NDArray[np.uint8]:
    """Every byte at random, scales among them: huge ones, subnormal ones, infinite ones and NaN occur."""
    block_type = BY_NAME[name]
    shape = (num_elements // block_type.elements, block_type.num_bytes)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def by_gguf(blocks: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    with warnings.catch_warnings():  # products with infinite scales
        warnings.simplefilter("ignore", RuntimeWarning)
        wanted: NDArray[np.float32] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]).reshape(-1)
    return wanted


def by_us(blocks: NDArray[np.uint8], block_type: BlockType) -> NDArray[np.float32]:
    found = np.empty(len(blocks) * block_type.elements, np.float32)
    dequantize(block_type, blocks.tobytes(), found)
    return found


def same_bits(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """NaN is equal to NaN, whatever its payload; 0 is not equal to -0."""
    nan = np.isnan(wanted)
    return bool((np.isnan(found) == nan).all() and (found.view(np.uint32) == wanted.view(np.uint32))[~nan].all())


@pytest.mark.parametrize("name", BY_NAME)
def test_random_blocks_become_the_floats_that_gguf_makes_of_them(name: str) -> None:
    blocks = random_blocks(name, PIECE_ELEMENTS + 512)  # more than are decoded at once
    wanted = by_gguf(blocks, name)
    assert np.isfinite(wanted).mean() > 0.9
    assert same_bits(by_us(blocks, BY_NAME[name]), wanted)


@pytest.mark.parametrize("name", [name for name in BY_NAME if BY_NAME[name].elements > 1 and name != "MXFP4"])
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan, 0.0, -0.0, 65504.0, 6e-8])
def test_scales_at_the_ends_of_float16_are_decoded_as_by_gguf(name: str, scale: float) -> None:
    blocks = random_blocks(name, 8 * 256)
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0, 2)):
        blocks[::2, place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    assert same_bits(by_us(blocks, BY_NAME[name]), by_gguf(blocks, name))


def test_numbers_names_and_sizes_are_those_of_ggml() -> None:
    sizes = {kind.value: (kind.name, *size) for kind, size in gguf.constants.GGML_QUANT_SIZES.items()}
    for number, block_type in BLOCK_TYPES.items():
        assert (block_type.name, block_type.elements, block_type.num_bytes) == sizes[number]
    assert {number: sizes[number][0] for number in UNREAD_TYPES} == UNREAD_TYPES
    assert BLOCK_TYPES.keys() | UNREAD_TYPES.keys() == sizes.keys()


def test_mxfp4_values_and_scales_are_those_of_the_ocp_specification() -> None:
    """By sign, exponent and mantissa: subnormal numbers have no leading 1. A product of the two is exact."""
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert DOUBLED_VALUES[code] == 2 * (-magnitude if code & 8 else magnitude)
    assert HALF_SCALES.dtype == np.float32
    assert [float(scale) for scale in HALF_SCALES] == [2.0 ** (exponent - 128) for exponent in range(256)]


def written(path: Path, name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, NDArray[np.float32]]:
    """A tensor of random blocks in a file, and what gguf makes of all of it."""
    blocks = random_blocks(name, int(np.prod(shape)))
    number = gguf.GGMLQuantizationType[name].value
    entry = tensor(name=b"weight", shape=shape[::-1], kind=number)
    path.write_bytes(container(entry, num_tensors=1, data=blocks.tobytes()))
    return read_gguf(path).tensors["weight"], by_gguf(blocks, name).reshape(shape)


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_of_the_outermost_dimension_are_those_of_the_whole_tensor(name: str, tmp_path: Path) -> None:
    stored, whole = written(tmp_path / "a.gguf", name, (6, 3, 512))
    assert (stored.shape, stored.dtype) == ((6, 3, 512), name)
    assert stored.num_bytes == whole.size // BY_NAME[name].elements * BY_NAME[name].num_bytes
    for begin, end in ((0, 6), (0, 1), (5, 6), (2, 4), (3, 3)):
        rows = stored.read(begin, end)
        assert rows.dtype == np.float32 and rows.shape == (end - begin, 3, 512)
        assert same_bits(rows, whole[begin:end])
    assert same_bits(stored.read(), whole) and same_bits(stored.read(4), whole[4:])


def test_rows_of_a_vector_may_begin_within_a_block(tmp_path: Path) -> None:
    stored, whole = written(tmp_path / "a.gguf", "Q5_1", (128,))
    for begin, end in ((0, 128), (31, 33), (40, 50), (127, 128)):
        assert same_bits(stored.read(begin, end), whole[begin:end])


def test_rows_take_the_memory_of_themselves(tmp_path: Path) -> None:
    """Of a tensor of 256 MB in a file with a hole, one row is read."""
    path, row = tmp_path / "a.gguf", 1 << 10
    head = container(tensor(name=b"weight", shape=(row, 1 << 16), kind=0), num_tensors=1)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 4 * (row << 16))
        file.seek(-4, 2)
        file.write(struct.pack("<f", 0.5))
    stored = read_gguf(path).tensors["weight"]
    tracemalloc.start()
    assert stored.read((1 << 16) - 1)[0, -2:].tolist() == [0.0, 0.5]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
