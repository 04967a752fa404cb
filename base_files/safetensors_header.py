"""The header of a safetensors file: which tensors it holds, and where their bytes are.

https://github.com/huggingface/safetensors, "Format". The file may be a stranger's: everything is held against its size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library reads."""
MAX_NAME_CHARS, MAX_DIMENSIONS = 512, 8
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Formats whose tensors' sizes are checked; others, as those of 8 bits and fewer, are taken as they are."""
FLOAT_DTYPES = ("F32", "F16", "BF16")
"""What the tensors of an adapter are in."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its bytes are ``[begin, end)`` of the whole file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> Mapping[str, TensorEntry]:
    """The entries of a file on disk, of which only the header is read. Raises ``ValueError`` or ``OSError``."""
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), MAX_HEADER_BYTES))
    try:
        return parse_header(start, path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def parse_header(
    data: bytes, size: int | None = None, *, max_bytes: int = MAX_HEADER_BYTES
) -> Mapping[str, TensorEntry]:
    """Every tensor's entry, checked against the file: spans inside it, end to end, without gap or overlap.

    ``data`` is the file, or its header alone; then ``size`` says how long the file is. ``max_bytes`` bounds the header.
    Raises ``ValueError`` with a sentence that says what is wrong.
    """
    if len(data) < 8:
        raise ValueError("the file is truncated: it ends before the header's length")
    length = int.from_bytes(data[:8], "little")
    if length > max_bytes or 8 + length > len(data):
        raise ValueError(f"the file is truncated or no safetensors file: it announces a header of {length} bytes")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    _check_spans(entries, 8 + length, len(data) if size is None else size)
    return entries


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name stands twice in it")
    return names


def _entry(name: str, value: object, offset: int) -> TensorEntry:
    if len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise ValueError(f"the name {name!r:.80} is no tensor's: it is longer than {MAX_NAME_CHARS} or no plain text")
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            len(shape) <= MAX_DIMENSIONS and all(_is_size(number) for number in (*shape, begin, end)) and begin <= end
        ):
            sizes = tuple(int(str(number)) for number in shape)
        case _:
            raise ValueError(f"the header's entry for tensor {name!r} is malformed")
    if dtype in DTYPE_BYTES and end - begin != math.prod(sizes) * DTYPE_BYTES[dtype]:
        raise ValueError(
            f"tensor {name!r} of shape {list(sizes)} and type {dtype} does not fill its {end - begin} bytes"
        )
    return TensorEntry(name, dtype, sizes, offset + begin, offset + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_spans(entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    cursor = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != cursor:
            raise ValueError(f"tensor {name!r} overlaps another one or leaves a gap before it")
        cursor = entry.end
    if cursor > size:
        raise ValueError(f"the file is truncated: its header describes {cursor} bytes, it has {size}")
    if cursor < size:
        raise ValueError(f"the file has {size - cursor} bytes more than its header describes")
