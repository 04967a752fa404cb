"""Weights of a mixture's experts, read one expert at a time as the parameter with three dimensions that they become.

Safetensors have them in two other forms: a matrix for every expert (``experts.3.up_proj.weight``), which transformers
stacks in memory, and GPT-OSS's MXFP4 (``experts.down_proj_blocks`` and ``_scales``), which it dequantizes as a whole.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.mxfp4 import DOUBLED_VALUES, HALF_SCALES
from base_files.tensors import FLOAT_TYPES, SafetensorsTensor, StoredTensor

_OF_ONE_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight")
_MATRICES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""By parameter, the matrices that are one below the other in it, under each of the names that they have."""
_MIXTRAL_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."
"""What Mixtral's files and transformers call the module of router and experts."""
_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_ELEMENTS = 32


def with_experts(tensors: Mapping[str, SafetensorsTensor]) -> Mapping[str, StoredTensor]:
    """The tensors of a base's files, with those of experts joined into parameters of three dimensions.

    Raises ``ValueError`` where one is missing, or shapes do not fit together.
    """
    parameters: list[StackedExperts | MXFP4Experts] = [*_stacked(tensors), *_mxfp4(tensors)]
    parts = {part for parameter in parameters for part in parameter.part_names}
    joined: dict[str, StoredTensor] = {parameter.name: parameter for parameter in parameters}
    named = {**{name: tensor for name, tensor in tensors.items() if name not in parts}, **joined}
    if any(_MIXTRAL_BLOCK in name for name in parts):
        return {name.replace(_MIXTRAL_BLOCK, _BLOCK): tensor for name, tensor in named.items()}
    return named


@dataclass(frozen=True)
class StackedExperts:
    """A ``StoredTensor`` of matrices: ``experts`` has those of each expert, one below the other."""

    name: str
    experts: Sequence[Sequence[SafetensorsTensor]]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.experts[0]
        return len(self.experts), sum(matrix.shape[0] for matrix in first), first[0].shape[1]

    @property
    def dtype(self) -> str:
        return self.experts[0][0].dtype

    @property
    def num_bytes(self) -> int:
        return sum(matrix.num_bytes for matrices in self.experts for matrix in matrices)

    @property
    def part_names(self) -> Iterator[str]:
        """The names of its matrices in the files."""
        return (matrix.name for matrices in self.experts for matrix in matrices)

    def read(self, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """As ``StoredTensor.read``."""
        floats = np.empty((len(self.experts[begin:end]), *self.shape[1:]), np.float32)
        for expert, matrices in zip(floats, self.experts[begin:end], strict=True):
            np.concatenate([matrix.read() for matrix in matrices], out=expert)
        return floats


@dataclass(frozen=True)
class MXFP4Experts:
    """A ``StoredTensor`` of GPT-OSS's MXFP4: [experts, in, out], as transformers has it.

    ``blocks`` uint8 [experts, out, in / 32, 16] holds two values a byte, the lower half first; ``scales`` uint8
    [experts, out, in / 32].
    """

    name: str
    blocks: SafetensorsTensor
    scales: SafetensorsTensor

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, num_blocks = self.scales.shape
        return experts, num_blocks * _BLOCK_ELEMENTS, outputs

    @property
    def dtype(self) -> str:
        return "MXFP4"

    @property
    def num_bytes(self) -> int:
        return self.blocks.num_bytes + self.scales.num_bytes

    @property
    def part_names(self) -> Iterator[str]:
        """The names of its two tensors in the files."""
        return iter((self.blocks.name, self.scales.name))

    def read(self, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """As ``StoredTensor.read``; the result is a transposed view."""
        pairs = np.frombuffer(self.blocks.read_bytes(begin, end), np.uint8)
        exponents = np.frombuffer(self.scales.read_bytes(begin, end), np.uint8)
        floats = np.take(_PAIRS, pairs).view(np.float32).reshape(len(exponents), _BLOCK_ELEMENTS)
        with np.errstate(over="ignore"):
            floats *= np.take(HALF_SCALES, exponents)[:, None]
        return floats.reshape(-1, self.shape[2], self.shape[1]).transpose(0, 2, 1)


def _pairs() -> NDArray[np.uint64]:
    """The two doubled values of each byte: the bits of two float32, uint64 [256], which are looked up at once.

    Unlike ggml's integers they have a negative zero.
    """
    values = DOUBLED_VALUES.astype(np.float32)
    values[8] = -0.0
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], axis=1).view(np.uint64).ravel()


_PAIRS = _pairs()


def _stacked(tensors: Mapping[str, SafetensorsTensor]) -> Iterator[StackedExperts]:
    """The parameters whose experts have matrices of their own, in floats."""
    found: dict[str, dict[str, dict[int, SafetensorsTensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        match = _OF_ONE_EXPERT.fullmatch(name)
        if match is not None and tensor.dtype in FLOAT_TYPES:
            found[match["experts"]][match["matrix"]][int(match["number"])] = tensor
    for experts, matrices in found.items():
        count = 1 + max(number for numbered in matrices.values() for number in numbered)
        for parameter, alternatives in _MATRICES.items():
            for names in alternatives:
                if any(name in matrices for name in names):
                    yield _stack(f"{experts}.{parameter}", names, [matrices[name] for name in names], count)


def _stack(
    parameter: str, names: Sequence[str], columns: Sequence[Mapping[int, SafetensorsTensor]], count: int
) -> StackedExperts:
    """A parameter of ``count`` experts; ``columns`` are the matrices under each name, by expert."""
    for name, column in zip(names, columns, strict=True):
        if missing := sorted(set(range(count)) - set(column)):
            raise ValueError(f"{parameter} cannot be joined: expert {missing[0]} of {count} has no {name}")
        if len({tensor.shape for tensor in column.values()}) > 1 or len(column[0].shape) != 2:
            raise ValueError(f"{parameter} cannot be joined: its experts' {name} differ in shape")
    if len({column[0].shape[1] for column in columns}) > 1:
        raise ValueError(f"{parameter} cannot be joined: {' and '.join(names)} have different widths")
    return StackedExperts(parameter, [[column[number] for column in columns] for number in range(count)])


def _mxfp4(tensors: Mapping[str, SafetensorsTensor]) -> Iterator[MXFP4Experts]:
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS) or blocks.dtype != "U8":
            continue
        parameter = name.removesuffix(_BLOCKS)
        scales = tensors.get(parameter + _SCALES)
        if scales is None:
            raise ValueError(f"{name} has no {parameter + _SCALES}")
        if len(scales.shape) != 3 or blocks.shape != (*scales.shape, _BLOCK_ELEMENTS // 2) or scales.dtype != "U8":
            raise ValueError(
                f"{name} is no MXFP4: its shape is {list(blocks.shape)}, that of its scales {list(scales.shape)} in "
                f"{scales.dtype}"
            )
        yield MXFP4Experts(parameter, blocks, scales)
