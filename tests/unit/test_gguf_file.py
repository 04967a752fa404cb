"""The GGUF reader: what gguf's own writer wrote is read, and a hostile file is refused with a sentence."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from base_files.gguf.file import is_gguf, read_gguf
from base_files.gguf.header import MAX_STRINGS
from tests.unit.gguf_files import container, key, tensor, text

KEY = b"general.name"
DATA_BYTES = 128 + 144


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
    for entry in theirs.tensors:
        wanted = gguf.quants.dequantize(entry.data, entry.tensor_type)
        assert np.array_equal(found.read(entry.name), wanted) and found.tensors[entry.name].shape == (5, 64)
    assert found.read("F16").dtype == np.float16 and found.read("BF16").dtype == np.float32


def test_metadata_is_read_by_type(tmp_path: Path) -> None:
    found = read_gguf(write(tmp_path / "a.gguf")).metadata
    assert {key: found[key] for key in ("a.text", "a.float", "a.flag", "a.number", "a.texts")} == {
        "a.text": "Grüße", "a.float": 0.5, "a.flag": True, "a.number": -(1 << 40), "a.texts": ["one", "two"],
    }  # fmt: skip
    numbers = found["a.numbers"]
    assert isinstance(numbers, np.ndarray) and numbers.tolist() == [1, 2, 3]


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
    "a shape beyond 64 bits": (
        container(tensor(shape=(1 << 32, 1 << 31)), num_tensors=1, data=b"x" * 64), "truncated: blk.0",
    ),
    "more keys than any model has": (container(num_keys=100_001, data=bytes(1 << 21)), "100000 are read at most"),
    "a flag among lengths": (
        container(key(KEY, 9, struct.pack("<IQ", 12, (1 << 61) + 1)), num_keys=1), "the length of general.name",
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


def write_small(path: Path) -> bytes:
    """A file of every kind of value, and tensors of three types; returns its bytes."""
    numbers = b"".join(
        key(b"a.%d" % kind, kind, b"\1" * size)
        for kind, size in {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}.items()
    )
    texts = key(b"a.text", 8, text("Grüße".encode())) + key(
        b"a.texts", 9, struct.pack("<IQ", 8, 3) + text(b"one") + text(b"") + text("中".encode())
    )
    flags = key(b"a.flags", 9, struct.pack("<IQ", 7, 3) + b"\0\1\2")
    integers = key(b"a.integers", 9, struct.pack("<IQ", 4, 2) + struct.pack("<2I", 1, 2))
    entries = (
        tensor(b"blk.0.attn_q.weight", (8, 4), 1, 0)
        + tensor(b"blk.0.ffn_up.weight", (32, 2), 3, 64)
        + tensor(b"output.weight", (256, 1), 12, 128)
    )
    data = np.random.default_rng(0).integers(0, 256, DATA_BYTES, dtype=np.uint8).tobytes()
    whole = container(numbers, texts, flags, integers, entries, num_tensors=3, num_keys=15, data=data)
    path.write_bytes(whole)
    return whole


def outcome(path: Path) -> str:
    """Read everything. Any exception but ``ValueError`` fails the test; its sentence is short and on one line."""
    try:
        found = read_gguf(path)
        for name, stored in found.tensors.items():
            assert found.read(name).shape == stored.shape
    except ValueError as error:
        sentence = str(error)
    else:
        return "read"
    assert sentence.isprintable() and 10 < len(sentence) < 1200
    return sentence


def test_a_file_is_refused_wherever_it_is_cut_off(tmp_path: Path) -> None:
    size = len(write_small(tmp_path / "a.gguf"))
    for cut in range(size - 1, -1, -1):
        os.truncate(tmp_path / "a.gguf", cut)
        assert "truncated" in outcome(tmp_path / "a.gguf")


def test_bytes_after_the_last_tensor_are_accepted(tmp_path: Path) -> None:
    whole = write_small(tmp_path / "a.gguf")
    assert outcome(tmp_path / "a.gguf") == "read"
    (tmp_path / "a.gguf").write_bytes(whole + bytes(1000))
    assert outcome(tmp_path / "a.gguf") == "read"


def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    """Each byte of the header becomes another one, and several bytes random ones. Memory stays small."""
    whole = write_small(tmp_path / "a.gguf")
    header = len(whole) - DATA_BYTES
    random = np.random.default_rng(0)
    outcomes = []
    tracemalloc.start()
    with (tmp_path / "a.gguf").open("r+b", buffering=0) as file:
        for position in [*range(header), *(random.integers(0, header, 4) for _ in range(200))]:
            places = np.atleast_1d(position)
            for place in places:
                file.seek(place)
                file.write(bytes([whole[place] ^ int(random.choice([255, 1 << int(random.integers(8))]))]))
            outcomes.append(outcome(tmp_path / "a.gguf"))
            for place in places:
                file.seek(place)
                file.write(whole[place : place + 1])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert outcome(tmp_path / "a.gguf") == "read"
    assert 50 < outcomes.count("read") < len(outcomes) - 500


def test_a_flag_is_true_where_its_byte_is_not_zero(tmp_path: Path) -> None:
    write_small(tmp_path / "a.gguf")
    flags = read_gguf(tmp_path / "a.gguf").metadata["a.flags"]
    assert isinstance(flags, np.ndarray) and flags.dtype == np.bool_
    assert flags.view(np.uint8).tolist() == [0, 1, 1]


def test_tensors_may_stand_in_any_order(tmp_path: Path) -> None:
    """And with holes between them."""
    entries = tensor(b"first", offset=64) + tensor(b"second", offset=0) + tensor(b"third", offset=128)
    values = np.arange(40, dtype="<f4")
    (tmp_path / "a.gguf").write_bytes(container(entries, num_tensors=3, data=values.tobytes()))
    found = read_gguf(tmp_path / "a.gguf")
    assert {name: found.read(name)[0, 0] for name in found.tensors} == {"first": 16, "second": 0, "third": 32}


def test_a_large_vocabulary_is_read_whole(tmp_path: Path) -> None:
    """Its strings stand across the pieces that are read ahead, and one is longer than such a piece."""
    tokens = [f"token {number} ß" * (number % 7) for number in range(50_000)] + ["long " * 100_000]
    values = struct.pack("<IQ", 8, len(tokens)) + b"".join(text(token.encode()) for token in tokens)
    path = tmp_path / "a.gguf"
    path.write_bytes(container(key(b"tokens", 9, values), key(b"last", 0, b"\7"), num_keys=2))
    found = read_gguf(path).metadata
    assert found["tokens"] == tokens and found["last"] == 7


def test_more_strings_than_any_vocabulary_has_are_refused(tmp_path: Path) -> None:
    values = struct.pack("<IQ", 8, MAX_STRINGS + 1) + bytes(8 * (MAX_STRINGS + 1))
    (tmp_path / "a.gguf").write_bytes(container(key(KEY, 9, values), num_keys=1))
    with pytest.raises(ValueError, match=f"more than {MAX_STRINGS} strings"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize("lost", [1, 400, 900])
def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(lost: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    found = read_gguf(path)
    os.truncate(path, found.tensors["Q8_0"].end - lost)
    with pytest.raises(ValueError, match="became shorter"):
        found.read("Q8_0")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").mkdir()
    for path in (tmp_path / "a.gguf", tmp_path / "b.gguf", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path.name} is not a regular file"):
            read_gguf(path)
        assert not is_gguf(path)


def test_a_file_that_a_pipe_takes_the_place_of_is_not_waited_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    found = read_gguf(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"a\.gguf is not a regular file"):
        found.read("F32")
