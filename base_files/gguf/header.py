"""The header of a GGUF file: its metadata, and where its tensors are.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The file may
be a stranger's: every count, length and offset is held against the file's size before anything is read or allocated.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.gguf.blocks import BLOCK_TYPES, UNREAD_TYPES
from base_files.gguf.tensor import GGUFTensor, open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 * 1024 * 1024
MAX_TENSORS, MAX_KEYS, MAX_STRINGS = 100_000, 100_000, 1 << 22
MAX_NAME_BYTES, MAX_DIMENSIONS, MAX_ALIGNMENT = 512, 4, 1 << 20
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_AHEAD_BYTES = 1 << 18
_LENGTH = struct.Struct("<Q")

Value = str | int | float | bool | list[str] | NDArray[Any]


@dataclass(frozen=True)
class GGUFHeader:
    """One file's metadata by key and its tensors by name; arrays of numbers are numpy's."""

    path: Path
    alignment: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Read and check one file's header. Raises ``ValueError`` with a sentence on what is wrong, or ``OSError``."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        reader = _Reader(file, size)
        num_tensors, num_keys = _read_start(reader)
        metadata = _read_metadata(reader, num_keys)
        alignment = _alignment(metadata)
        entries = [_read_tensor(reader, path) for _ in range(num_tensors)]
        start = -(-reader.position // alignment) * alignment
        tensors = {entry.name: entry for entry in (_placed(entry, start, alignment) for entry in entries)}
        if len(tensors) != num_tensors:
            raise ValueError("the name of a tensor stands twice in its header")
        _check_spans(tensors.values(), size)
        return GGUFHeader(path, alignment, metadata, tensors)


class _Reader:
    """Reads forward from the beginning, never beyond the file's size or the header's limit."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file = file
        self._size = size
        self._end = min(size, MAX_HEADER_BYTES)
        self._buffer, self._at, self._begin = b"", 0, 0
        self._num_strings = 0

    @property
    def position(self) -> int:
        return self._begin + self._at

    @property
    def remaining(self) -> int:
        return self._end - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.remaining:
            raise self._damaged(f"{what} needs {count} bytes, {self.remaining} remain")
        if count > len(self._buffer) - self._at:
            self._read_ahead(count)
        self._at += count
        return self._buffer[self._at - count : self._at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))[0]

    def count(self, form: str, what: str, *, each: int, limit: int | None = None) -> int:
        """A count of things of ``each`` bytes at least."""
        value = int(self.number(form, what))
        if value * each > self.remaining:
            raise self._damaged(f"{what} is {value}")
        if limit is not None and value > limit:
            raise ValueError(f"{what} is {value}: {limit} are read at most")
        return value

    def text(self, what: str) -> str:
        data = self.take(self.count("Q", f"the length of {what}", each=1), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8 text") from None

    def texts(self, count: int, what: str) -> list[str]:
        """As often as ``count`` says; fast, since a vocabulary has hundreds of thousands."""
        self._num_strings += count
        if self._num_strings > MAX_STRINGS:
            raise ValueError(f"its arrays hold more than {MAX_STRINGS} strings with those of {what}")
        found: list[str] = []
        while len(found) < count:
            try:
                self._take_whole_texts(found, count)
            except UnicodeDecodeError:
                raise ValueError(f"{what} is not UTF-8 text") from None
            if len(found) < count:
                found.append(self.text(what))
        return found

    def _take_whole_texts(self, found: list[str], count: int) -> None:
        """Append those that stand whole in what was read ahead."""
        buffer, at, end = self._buffer, self._at, len(self._buffer)
        for _ in range(count - len(found)):
            if at + 8 > end:
                break
            stop = at + 8 + int(_LENGTH.unpack_from(buffer, at)[0])
            if stop > end:
                break
            found.append(buffer[at + 8 : stop].decode())
            at = stop
        self._at = at

    def name(self, what: str) -> str:
        text = self.text(what)
        if len(text.encode()) > MAX_NAME_BYTES or not text.isprintable() or not text:
            raise ValueError(f"{what} is {text!r:.80}: it is empty, longer than {MAX_NAME_BYTES} or no plain text")
        return text

    def _read_ahead(self, count: int) -> None:
        """Have ``count`` bytes in the buffer, and more where there are more."""
        kept = self._buffer[self._at :]
        wanted = min(max(count, _AHEAD_BYTES), self.remaining) - len(kept)
        data = self._file.read(wanted)
        if len(data) != wanted:
            raise ValueError("the file became shorter while it was read")
        self._buffer, self._at, self._begin = kept + data, 0, self.position

    def _damaged(self, why: str) -> ValueError:
        if self._end < self._size:
            return ValueError(f"the header is damaged or longer than {MAX_HEADER_BYTES} bytes: {why}")
        return ValueError(f"the header is truncated or damaged: {why}: fetch the file again")


def _read_start(reader: _Reader) -> tuple[int, int]:
    """Numbers of tensors and of keys."""
    if (magic := reader.take(4, "its magic number")) != MAGIC:
        raise ValueError(f"it is no GGUF file: it begins with {magic!r}")
    version = int(reader.number("I", "its version"))
    if version and version & 0xFFFF == 0:
        raise ValueError("it is a big-endian GGUF file: write it again without --bigendian")
    if version not in VERSIONS:
        raise ValueError(f"its GGUF version is {version}; versions 2 and 3 are read: write it again with a newer tool")
    num_tensors = reader.count("Q", "the number of tensors", each=_MIN_TENSOR_BYTES, limit=MAX_TENSORS)
    return num_tensors, reader.count("Q", "the number of keys", each=_MIN_KEY_BYTES, limit=MAX_KEYS)


def _read_metadata(reader: _Reader, count: int) -> Mapping[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = reader.name("a key")
        if key in metadata:
            raise ValueError(f"the key {key} stands twice in its header")
        metadata[key] = _read_value(reader, int(reader.number("I", f"the type of {key}")), key)
    return metadata


def _read_value(reader: _Reader, kind: int, key: str) -> Value:
    if kind == _STRING:
        return reader.text(f"the value of {key}")
    if kind == _ARRAY:
        return _read_array(reader, key)
    if kind not in _SCALARS:
        raise ValueError(f"the value of {key} is of type {kind}, which GGUF does not have")
    value: int | float | bool = reader.number(_SCALARS[kind], f"the value of {key}")
    return value


def _read_array(reader: _Reader, key: str) -> Value:
    kind = int(reader.number("I", f"the type in {key}"))
    what = f"the length of {key}"
    if kind == _STRING:
        return reader.texts(reader.count("Q", what, each=8), f"a value of {key}")
    if kind not in _SCALARS:
        raise ValueError(f"{key} is an array of type {kind}, which is not read")
    dtype = np.dtype(f"<{_SCALARS[kind]}")
    count = reader.count("Q", what, each=dtype.itemsize)
    data = reader.take(count * dtype.itemsize, f"the values of {key}")
    return np.frombuffer(data, np.uint8) != 0 if dtype == np.bool_ else np.frombuffer(data, dtype)


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise ValueError(f"general.alignment is {value!r:.40}: it must be a power of two, {MAX_ALIGNMENT} at most")
    return value


def _read_tensor(reader: _Reader, path: Path) -> GGUFTensor:
    """A tensor's entry; its span is still relative to where data begins."""
    name = reader.name("the name of a tensor")
    num_dimensions = int(reader.number("I", f"the dimensions of {name}"))
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    inner_first = [int(reader.number("Q", f"the shape of {name}")) for _ in range(num_dimensions)]
    kind = int(reader.number("I", f"the type of {name}"))
    offset = int(reader.number("Q", f"the offset of {name}"))
    if kind not in BLOCK_TYPES:
        named = f"{kind} ({UNREAD_TYPES[kind]})" if kind in UNREAD_TYPES else kind
        known = ", ".join(block.name for block in BLOCK_TYPES.values())
        raise ValueError(f"tensor {name} is of ggml's type {named}; types that are read are {known}")
    block_type = BLOCK_TYPES[kind]
    if min(inner_first) < 1 or inner_first[0] % block_type.elements:
        raise ValueError(f"tensor {name} of type {block_type.name} has the impossible shape {inner_first[::-1]}")
    num_bytes = math.prod(inner_first) // block_type.elements * block_type.num_bytes
    return GGUFTensor(path, name, tuple(inner_first[::-1]), block_type, offset, offset + num_bytes)


def _placed(tensor: GGUFTensor, start: int, alignment: int) -> GGUFTensor:
    if tensor.begin % alignment:
        raise ValueError(f"tensor {tensor.name} begins at {tensor.begin}, no multiple of the alignment {alignment}")
    return replace(tensor, begin=start + tensor.begin, end=start + tensor.end)


def _check_spans(tensors: Iterable[GGUFTensor], size: int) -> None:
    """Tensors may stand in any order, and bytes may follow them."""
    cursor = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin < cursor:
            raise ValueError(f"tensor {tensor.name} overlaps another one")
        cursor = tensor.end
        if cursor > size:
            raise ValueError(
                f"the file is truncated: {tensor.name} ends at byte {cursor}, the file has {size}: fetch it again"
            )
