"""The GGUF reader: what gguf's own writer wrote is read, and a hostile file is refused with a sentence."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from base_files.gguf import is_gguf, read_gguf

KEY, TENSOR = b"general.name", b"blk.0.attn_q.weight.lora_a"


def write(path: Path, *, alignment: int | None = None) -> Path:
    """One tensor of each type, and one key of each."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_string("a.text", "Grüße")
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_int64("a.number", -(1 << 40))
    writer.add_array("a.texts", ["one", "two"])
    writer.add_array("a.numbers", [1, 2, 3])
    values = np.linspace(-3, 3, 5 * 64, dtype=np.float32).reshape(5, 64)
    for name in ("F32", "F16", "BF16", "Q8_0"):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_a_file_by_ggufs_own_writer_is_read_as_by_its_own_reader(alignment: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", alignment=alignment)
    found, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert is_gguf(path)
    assert found.tensors.keys() == {"F32", "F16", "BF16", "Q8_0"}
    for tensor in theirs.tensors:
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found.read(tensor.name), wanted) and found.tensors[tensor.name].shape == (5, 64)
    assert found.read("F16").dtype == np.float16 and found.read("BF16").dtype == np.float32


def test_metadata_is_read_by_type(tmp_path: Path) -> None:
    found = read_gguf(write(tmp_path / "a.gguf")).metadata
    assert {key: found[key] for key in ("a.text", "a.float", "a.flag", "a.number", "a.texts")} == {
        "a.text": "Grüße", "a.float": 0.5, "a.flag": True, "a.number": -(1 << 40), "a.texts": ["one", "two"],
    }  # fmt: skip
    numbers = found["a.numbers"]
    assert isinstance(numbers, np.ndarray) and numbers.tolist() == [1, 2, 3]


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes = TENSOR, shape: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def container(*parts: bytes, num_tensors: int = 0, num_keys: int = 0, version: int = 3, data: bytes = b"") -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(parts)
    return head + b"\0" * (-len(head) % 32) + data


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated or damaged: its magic number"),
    "another file": (b"PK\3\4" + b"x" * 99, "no GGUF file"),
    "version 1": (container(version=1), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more keys than bytes": (container(num_keys=1 << 62), "the number of keys is 4611686018427387904"),
    "more tensors than bytes": (container(num_tensors=1 << 62), "the number of tensors"),
    "a hundred thousand tensors": (
        container(num_tensors=100_001, data=b"\0" * 32 * 100_001), "100000 are read at most",
    ),
    "a string beyond the end": (
        container(struct.pack("<Q", 1 << 62) + b"x" * 99, num_keys=1), "the length of a key is 4611686018427387904",
    ),
    "an array beyond the end": (
        container(key(KEY, 9, struct.pack("<IQ", 0, 1 << 61)), num_keys=1), "the length of general.name",
    ),
    "strings beyond the end": (
        container(key(KEY, 9, struct.pack("<IQ", 8, 1 << 59)), num_keys=1), "the length of general.name",
    ),
    "an array of arrays": (container(key(KEY, 9, struct.pack("<IQ", 9, 1) + b"x" * 99), num_keys=1), "array of type 9"),
    "an unknown type": (container(key(KEY, 99, b"x" * 99), num_keys=1), "of type 99"),
    "an empty key": (container(key(b"", 0, b"x" * 99), num_keys=1), "a key is ''"),
    "an escape in a key": (container(key(b"\x1b[31m", 0, b"x" * 99), num_keys=1), "no plain text"),
    "not UTF-8": (container(key(b"\xff\xfe", 0, b"x" * 99), num_keys=1), "not UTF-8"),
    "a key twice": (container(key(KEY, 0, b"x"), key(KEY, 0, b"x"), num_keys=2), "stands twice"),
    "an odd alignment": (
        container(key(b"general.alignment", 4, struct.pack("<I", 24)), num_keys=1), "general.alignment is 24",
    ),
    "no alignment": (container(key(b"general.alignment", 4, struct.pack("<I", 0)), num_keys=1), "alignment is 0"),
    "alignment a text": (container(key(b"general.alignment", 8, text(b"32")), num_keys=1), "alignment is '32'"),
    "no dimensions": (container(tensor(shape=()), b"x" * 32, num_tensors=1), "has 0 dimensions"),
    "many dimensions": (container(tensor(shape=(1,) * 9), num_tensors=1), "has 9 dimensions"),
    "an empty shape": (container(tensor(shape=(0, 2)), num_tensors=1), "impossible shape"),
    "half a block": (container(tensor(shape=(33, 2), kind=8), num_tensors=1), "impossible shape"),
    "an unknown tensor type": (container(tensor(kind=16), num_tensors=1), r"ggml's type 16 \(IQ2_XXS\)"),
    "a tensor type that ggml does not have": (container(tensor(kind=99), num_tensors=1), "ggml's type 99;"),
    "a huge shape": (container(tensor(shape=((1 << 64) - 1,) * 4), num_tensors=1), "truncated: blk.0"),
    "data beyond the end": (container(tensor(), num_tensors=1, data=b"x" * 31), "truncated: blk.0"),
    "an odd offset": (container(tensor(offset=1), num_tensors=1, data=b"x" * 64), "no multiple of the alignment"),
    "a huge offset": (container(tensor(offset=1 << 63), num_tensors=1, data=b"x" * 64), "truncated: blk.0"),
    "tensors over each other": (
        container(tensor(), tensor(name=b"other"), num_tensors=2, data=b"x" * 64), "overlaps another one",
    ),
    "a name twice": (
        container(tensor(), tensor(offset=32), num_tensors=2, data=b"x" * 64), "the name of a tensor stands twice",
    ),
    "a long name": (container(tensor(name=b"x" * 513), num_tensors=1, data=b"x" * 64), "longer than 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_a_sentence_and_without_memory(case: str, tmp_path: Path) -> None:
    data, words = HOSTILE[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_truncated_or_damaged_file_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    """Cut at many places, and one byte after the other of the header made another."""
    whole = write(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "b.gguf"

    def read(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            found = read_gguf(path)
            for name in found.tensors:
                found.read(name)
        except ValueError:
            return False
        return True

    assert read(whole)
    assert not any(read(whole[:size]) for size in range(0, len(whole) - 32, 31))
    for position in range(0, 700, 7):
        read(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    found = read_gguf(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="became shorter"):
        found.read("Q8_0")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="not a regular file"):
        read_gguf(tmp_path / "a.gguf")
    assert not is_gguf(tmp_path / "a.gguf")
