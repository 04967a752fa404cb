"""The GGUF container: what its header says, and its tensors as floats, read one by one.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The file may
be a stranger's: every count, length and offset is held against the file's size before anything is read or allocated.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from base_files.gguf_blocks import BLOCK_TYPES, UNREAD_TYPES, BlockType, dequantize

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 * 1024 * 1024
MAX_TENSORS, MAX_NAME_BYTES, MAX_DIMENSIONS, MAX_ALIGNMENT = 100_000, 512, 4, 1 << 20
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

Value = str | int | float | bool | list[str] | NDArray[Any]


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: ``shape`` has the outermost dimension first, its bytes are ``[begin, end)`` of the file."""

    name: str
    shape: tuple[int, ...]
    block_type: BlockType
    begin: int
    end: int


@dataclass(frozen=True)
class GGUFFile:
    """A file's metadata by key and its tensors by name; arrays of numbers are numpy's."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]

    def read(self, name: str) -> NDArray[Any]:
        """A tensor of float32, or of float16 where it is stored so. Raises ``ValueError`` or ``OSError``."""
        tensor = self.tensors[name]
        with open(self.path, "rb") as file:
            file.seek(tensor.begin)
            data = file.read(tensor.end - tensor.begin)
        if len(data) != tensor.end - tensor.begin:
            raise ValueError(f"{self.path.name} became shorter while it was read")
        values = np.empty(math.prod(tensor.shape), np.float32)
        dequantize(tensor.block_type, data, values)
        return values.astype(np.float16 if tensor.block_type.name == "F16" else np.float32).reshape(tensor.shape)


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as a GGUF does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header. Raises ``ValueError`` with a sentence that says what is wrong, or ``OSError``."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        header = _Header(file, status.st_size)
        num_tensors, num_keys = _read_start(header)
        metadata = _read_metadata(header, num_keys)
        alignment = _alignment(metadata)
        infos = [_read_tensor_info(header) for _ in range(num_tensors)]
        start = -(-header.position // alignment) * alignment
        tensors = {info.name: info for info in (_placed(info, start, alignment) for info in infos)}
        if len(tensors) != num_tensors:
            raise ValueError("the name of a tensor stands twice in its header")
        _check_spans(tensors.values(), status.st_size)
        return GGUFFile(path, metadata, tensors)


class _Header:
    """Reads forward from the beginning, never beyond the file's size or the header's limit."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._end = min(size, MAX_HEADER_BYTES)
        self.position = 0

    @property
    def remaining(self) -> int:
        return self._end - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.remaining:
            raise ValueError(f"the header is truncated or damaged: {what} needs {count} bytes, {self.remaining} remain")
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("the file became shorter while it was read")
        self.position += count
        return data

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))[0]

    def count(self, form: str, what: str, *, each: int) -> int:
        """A count of things of ``each`` bytes at least."""
        value = int(self.number(form, what))
        if value * each > self.remaining:
            raise ValueError(f"the header is truncated or damaged: {what} is {value}")
        return value

    def text(self, what: str) -> str:
        data = self.take(self.count("Q", f"the length of {what}", each=1), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8 text") from None

    def name(self, what: str) -> str:
        text = self.text(what)
        if len(text.encode()) > MAX_NAME_BYTES or not text.isprintable() or not text:
            raise ValueError(f"{what} is {text!r:.80}: it is empty, longer than {MAX_NAME_BYTES} or no plain text")
        return text


def _read_start(header: _Header) -> tuple[int, int]:
    """Numbers of tensors and of keys."""
    if (magic := header.take(4, "its magic number")) != MAGIC:
        raise ValueError(f"it is no GGUF file: it begins with {magic!r}")
    version = int(header.number("I", "its version"))
    if version and version & 0xFFFF == 0:
        raise ValueError("it is a big-endian GGUF file: write it again without --bigendian")
    if version not in VERSIONS:
        raise ValueError(f"its GGUF version is {version}; versions 2 and 3 are read: write it again with a newer tool")
    num_tensors = header.count("Q", "the number of tensors", each=_MIN_TENSOR_BYTES)
    if num_tensors > MAX_TENSORS:
        raise ValueError(f"it announces {num_tensors} tensors; {MAX_TENSORS} are read at most")
    return num_tensors, header.count("Q", "the number of keys", each=_MIN_KEY_BYTES)


def _read_metadata(header: _Header, count: int) -> Mapping[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = header.name("a key")
        if key in metadata:
            raise ValueError(f"the key {key} stands twice in its header")
        metadata[key] = _read_value(header, int(header.number("I", f"the type of {key}")), key)
    return metadata


def _read_value(header: _Header, kind: int, key: str) -> Value:
    if kind == _STRING:
        return header.text(f"the value of {key}")
    if kind == _ARRAY:
        return _read_array(header, key)
    if kind not in _SCALARS:
        raise ValueError(f"the value of {key} is of type {kind}, which GGUF does not have")
    value: int | float | bool = header.number(_SCALARS[kind], f"the value of {key}")
    return value


def _read_array(header: _Header, key: str) -> Value:
    kind = int(header.number("I", f"the type in {key}"))
    what = f"the length of {key}"
    if kind == _STRING:
        return [header.text(f"a value of {key}") for _ in range(header.count("Q", what, each=8))]
    if kind not in _SCALARS:
        raise ValueError(f"{key} is an array of type {kind}, which is not read")
    dtype = np.dtype(f"<{_SCALARS[kind]}")
    count = header.count("Q", what, each=dtype.itemsize)
    return np.frombuffer(header.take(count * dtype.itemsize, f"the values of {key}"), dtype)


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise ValueError(f"general.alignment is {value!r:.40}: it must be a power of two, {MAX_ALIGNMENT} at most")
    return value


def _read_tensor_info(header: _Header) -> GGUFTensor:
    """A tensor's entry; its span is still relative to where data begins."""
    name = header.name("the name of a tensor")
    num_dimensions = int(header.number("I", f"the dimensions of {name}"))
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    inner_first = [int(header.number("Q", f"the shape of {name}")) for _ in range(num_dimensions)]
    kind = int(header.number("I", f"the type of {name}"))
    offset = int(header.number("Q", f"the offset of {name}"))
    if kind not in BLOCK_TYPES:
        named = f"{kind} ({UNREAD_TYPES[kind]})" if kind in UNREAD_TYPES else kind
        known = ", ".join(block.name for block in BLOCK_TYPES.values())
        raise ValueError(f"tensor {name} is of ggml's type {named}; types that are read are {known}")
    block_type = BLOCK_TYPES[kind]
    if min(inner_first) < 1 or inner_first[0] % block_type.elements:
        raise ValueError(f"tensor {name} of type {block_type.name} has the impossible shape {inner_first[::-1]}")
    num_bytes = math.prod(inner_first) // block_type.elements * block_type.num_bytes
    return GGUFTensor(name, tuple(inner_first[::-1]), block_type, offset, offset + num_bytes)


def _placed(tensor: GGUFTensor, start: int, alignment: int) -> GGUFTensor:
    if tensor.begin % alignment:
        raise ValueError(f"tensor {tensor.name} begins at {tensor.begin}, no multiple of the alignment {alignment}")
    return GGUFTensor(tensor.name, tensor.shape, tensor.block_type, start + tensor.begin, start + tensor.end)


def _check_spans(tensors: Iterable[GGUFTensor], size: int) -> None:
    cursor = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin < cursor:
            raise ValueError(f"tensor {tensor.name} overlaps another one")
        cursor = tensor.end
        if cursor > size:
            raise ValueError(f"the file is truncated: {tensor.name} ends at byte {cursor}, the file has {size}")
