"""A sample of a base: what it has in common with the same base in another format, as a folder and as GGUF files.

An adapter carries that of the base it was trained on. The sample is a few kilobytes: the architecture, a digest of the
vocabulary, and some values of the embedding, the last norm, and every norm, linear layer and bias of the first, the
middle and the last layer. Of a mixture, the experts are left out, since formats divide them differently.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.common_architecture import Fields, common_architecture
from base_files.errors import BaseMalformed
from base_files.source import BaseSource
from base_files.tensors import StoredTensor
from base_files.vocabulary import vocabulary_digest

MAX_TENSORS = 48
VECTOR_VALUES, MATRIX_VALUES = 8, 32
"""Values of a tensor of one dimension, and of one of two: as many as share a scale in most block types."""
FLOATS = ("F32", "F16", "BF16")

_NAME = re.compile(
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?(embed_tokens\.weight|norm\.weight|layers\.(\d+)\.[\w.]+)"
)
"""A tensor of a decoder, and its name without what contains the decoder."""
_TEXT = re.compile(r"([A-Z0-9_]{2,8}) (\d{1,9}(?:x\d{1,9})?) ([A-Za-z0-9+/]+=*)")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SampledTensor:
    """Some values of a tensor; ``dtype`` names the format of its file, as in ``StoredTensor``."""

    dtype: str
    shape: tuple[int, ...]
    values: Floats

    @classmethod
    def of(cls, tensor: StoredTensor) -> SampledTensor:
        """The values at fixed places: spread over a vector, or side by side in a row an eighth down a matrix.

        Columns begin at a multiple of 32, about the middle of the row. Raises as ``StoredTensor.read``.
        """
        if len(tensor.shape) == 1:
            size = tensor.shape[0]
            count = min(size, VECTOR_VALUES)
            values = tensor.read()[[number * size // count for number in range(count)]]
        else:
            rows, columns = tensor.shape
            begin = columns // 2 // MATRIX_VALUES * MATRIX_VALUES
            values = tensor.read(rows // 8, rows // 8 + 1)[0, begin : begin + MATRIX_VALUES]
        return cls(tensor.dtype, tensor.shape, values.astype(np.float32))

    @classmethod
    def parse(cls, text: str) -> SampledTensor:
        """The inverse of ``str``. Raises ``ValueError``."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"it is {text!r:.80}: a type, a shape and values are expected, like 'BF16 2 pD0bPA=='")
        dtype, shape = match[1], tuple(int(size) for size in match[2].split("x"))
        data = base64.b64decode(match[3], validate=True)
        count = min(shape[0], VECTOR_VALUES) if len(shape) == 1 else min(shape[1], MATRIX_VALUES)
        itemsize = 4 if dtype == "F32" else 2
        if len(data) != itemsize * count:
            raise ValueError(f"it has {len(data)} bytes of values, and {count} values of {itemsize} bytes are expected")
        values = _decoded(dtype, data)
        if not np.isfinite(values).all():
            raise ValueError("it has values that are infinite or no numbers")
        return cls(dtype, shape, values)

    def __str__(self) -> str:
        """Type, shape, and the values little-endian in base64.

        They are F32 or BF16 as the tensor is, and F16 of any other type, which of a block type rounds them.
        """
        if self.dtype == "F32":
            data = self.values.astype("<f4").tobytes()
        elif self.dtype == "BF16":
            data = (self.values.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data = self.values.astype("<f2").tobytes()
        return f"{self.dtype} {'x'.join(map(str, self.shape))} {base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class WeightsSample:
    """``vocabulary`` is None where the tokenizer's tokens are not known."""

    architecture: Fields
    vocabulary: str | None
    tensors: Mapping[str, SampledTensor]

    @classmethod
    def parse(cls, sample: Mapping[str, Any]) -> WeightsSample:
        """The inverse of ``to_json``, of an object with keys and types as in the sidecar. Raises ``ValueError``."""
        tensors = {}
        for name, text in sample["tensors"].items():
            try:
                tensors[name] = SampledTensor.parse(text)
            except ValueError as error:
                raise ValueError(f"the sample of the base's tensor {name!r:.80} is malformed: {error}") from None
        return cls(sample["architecture"], sample["vocabulary"], tensors)

    def to_json(self) -> dict[str, Any]:
        return {
            "architecture": dict(self.architecture),
            "vocabulary": self.vocabulary,
            "tensors": {name: str(tensor) for name, tensor in self.tensors.items()},
        }

    @property
    def weights_format(self) -> str:
        """The format of most of the matrices."""
        dtypes = [tensor.dtype for tensor in self.tensors.values() if len(tensor.shape) == 2]
        return max(sorted(set(dtypes)), key=dtypes.count, default="F32")


def sample_of(source: BaseSource) -> WeightsSample | None:
    """The sample of a base; None if its tensors' names are those of no decoder that both formats can hold.

    Reads some rows and the tokenizer. Raises ``BaseMalformed``.
    """
    chosen = _choose(source.tensors())
    if "embed_tokens.weight" not in chosen or "norm.weight" not in chosen:
        return None
    try:
        tensors = {name: SampledTensor.of(tensor) for name, tensor in chosen.items()}
    except (OSError, ValueError) as error:
        raise BaseMalformed(source.name, str(error)) from error
    return WeightsSample(common_architecture(source.config), vocabulary_digest(source.token_texts()), tensors)


def _choose(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors to sample by their names in the decoder, sorted."""
    found: dict[str, StoredTensor] = {}
    layers: dict[str, int] = {}
    for full_name, tensor in tensors.items():
        match = _NAME.fullmatch(full_name)
        if match is None or ".experts." in full_name or not _can_be_sampled(tensor):
            continue
        found[match[1]] = tensor
        if match[2] is not None:
            layers[match[1]] = int(match[2])
    last = max(layers.values(), default=0)
    wanted = {0, last // 2, last}
    names = sorted(
        (name for name in found if layers.get(name, 0) in wanted), key=lambda name: (layers.get(name, -1), name)
    )
    return {name: found[name] for name in names[:MAX_TENSORS]}


def _can_be_sampled(tensor: StoredTensor) -> bool:
    is_read = tensor.dtype in FLOATS or tensor.dtype.startswith(("Q", "IQ", "MXFP4"))
    return is_read and len(tensor.shape) in (1, 2) and 0 not in tensor.shape and "/" not in tensor.dtype


def _decoded(dtype: str, data: bytes) -> Floats:
    if dtype == "F32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f2").astype(np.float32)
