"""Whether two samples are of the same base in two formats: within the rounding of the coarser one.

Two formats of floats must be equal after the coarser one's rounding. A block type rounds to levels, whose distance
follows from the values that share a scale: no value may be off by more than a tool would round it, nor all of them
together by more than rounding adds up to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.common_architecture import differing_fields
from base_files.weights_sample import FLOATS, Floats, SampledTensor, WeightsSample

MAX_SPREAD = 1.4
"""Root mean square of all deviations from block types, in units of that of even rounding to their levels."""
_SUM_ERROR = 2.0**-23
"""What adding 1 to a norm's weight and subtracting it leaves."""


@dataclass(frozen=True)
class _Levels:
    """A block type: so many values share a scale, and ``per_range`` levels divide their range.

    ``symmetric``: from the largest magnitude to its negative, instead of from the lowest to the highest value or 0.
    ``slack`` bounds a deviation, in halves of a level: 1 where every tool rounds to the nearest level, else more, since
    tools look for the scale of the least error, in which values that weigh little are cut off.
    """

    group: int
    per_range: float
    symmetric: bool
    slack: float = 6.0


BLOCK_LEVELS: Mapping[str, _Levels] = {
    "Q8_0": _Levels(32, 254, symmetric=True, slack=1.02),
    "Q4_0": _Levels(32, 16, symmetric=True),
    "Q5_0": _Levels(32, 32, symmetric=True),
    "Q4_1": _Levels(32, 15, symmetric=False),
    "Q5_1": _Levels(32, 31, symmetric=False),
    "Q2_K": _Levels(16, 3, symmetric=False),
    "Q3_K": _Levels(16, 8, symmetric=True),
    "Q4_K": _Levels(32, 15, symmetric=False),
    "Q5_K": _Levels(32, 31, symmetric=False),
    "Q6_K": _Levels(16, 64, symmetric=True),
    "IQ4_NL": _Levels(32, 10, symmetric=True),
    "IQ4_XS": _Levels(32, 10, symmetric=True),
    "MXFP4": _Levels(32, 6, symmetric=True),
}
"""By ggml's names. The levels of the last three are uneven: theirs is the largest distance."""


def compare(trained: WeightsSample, served: WeightsSample, *, same_container: bool) -> str | None:
    """A phrase for what differs and by how much, of bases with different fingerprints; None for the same base.

    ``same_container``: both are folders, or both GGUF files. Then fingerprints differ only if something is rounded.
    """
    if fields := differing_fields(trained.architecture, served.architecture):
        return f"the architecture differs ({', '.join(fields[:3])})"
    if not trained.tensors:
        return "the sample in the sidecar has no tensors"
    if same_container and all(
        _same_float_format(tensor, served.tensors.get(name)) for name, tensor in trained.tensors.items()
    ):
        return "the weights differ, since both have them in the same format, with different fingerprints"
    if trained.vocabulary is None or served.vocabulary is None:
        return "the tokens of one of the two are unknown, since it has no tokenizer.json"
    if trained.vocabulary != served.vocabulary:
        return "the tokens differ"
    if missing := sorted(trained.tensors.keys() - served.tensors.keys()):
        return f"the tensor {missing[0]} cannot be compared"
    return _weights_problem(trained.tensors, served.tensors)


def _same_float_format(ours: SampledTensor, theirs: SampledTensor | None) -> bool:
    return theirs is not None and ours.dtype == theirs.dtype and ours.dtype in FLOATS


def _weights_problem(trained: Mapping[str, SampledTensor], served: Mapping[str, SampledTensor]) -> str | None:
    ratios: list[NDArray[Any]] = []
    for name, ours in trained.items():
        theirs = served[name]
        if ours.shape != theirs.shape:
            return f"the weights of {name} have the shape {list(ours.shape)} instead of {list(theirs.shape)}"
        if _is_rounded(ours, theirs):
            continue
        block_types = [tensor.dtype for tensor in (ours, theirs) if tensor.dtype not in FLOATS]
        if unknown := [dtype for dtype in block_types if dtype not in BLOCK_LEVELS]:
            return f"the weights of {name} are in {unknown[0]}, whose rounding is not known"
        halves = [_half_level(BLOCK_LEVELS[dtype], ours, theirs) for dtype in block_types]
        deviation = np.abs(ours.values - theirs.values)
        bound = _bound(block_types, halves, ours, theirs)
        worst = int(np.argmax(deviation - bound))
        if not deviation[worst] <= bound[worst]:  # also of a value that is no number
            return _deviation_problem(name, ours, theirs, worst, bound)
        ratios.append(deviation / np.sqrt(_even_rounding(halves) + _coding_error(ours, theirs) ** 2))
    spread = math.sqrt(float(np.mean(np.concatenate(ratios) ** 2))) if ratios else 0.0
    if spread > MAX_SPREAD:
        return f"the weights differ: they deviate {spread:.2f} times as much as rounding explains"
    return None


def _bound(block_types: Sequence[str], halves: Sequence[Floats], ours: SampledTensor, theirs: SampledTensor) -> Floats:
    """The largest deviation of each value; two formats of floats are equal after rounding, or not at all."""
    if not block_types:
        return np.zeros_like(ours.values)
    largest = [half * BLOCK_LEVELS[dtype].slack for dtype, half in zip(block_types, halves, strict=True)]
    bound: Floats = np.sum([*largest, _coding_error(ours, theirs)], axis=0, dtype=np.float32)
    return bound


def _even_rounding(halves: Sequence[Floats]) -> Floats:
    """The variance of values that are rounded to the nearest level, and lie evenly between two."""
    variances: Floats = np.sum([half**2 / 3 for half in halves], axis=0, dtype=np.float32)
    return variances


def _deviation_problem(name: str, ours: SampledTensor, theirs: SampledTensor, place: int, bound: Floats) -> str:
    allowed = f"rounding explains {bound[place]:.2g}" if bound[place] else "these formats allow no difference"
    return (
        f"the weights differ: {name} has {ours.values[place]:.6g} ({ours.dtype}) instead of "
        f"{theirs.values[place]:.6g} ({theirs.dtype}), and {allowed}"
    )


def _is_rounded(ours: SampledTensor, theirs: SampledTensor) -> bool:
    """Whether the values of one are those of the other, rounded to its own format of floats."""
    return any(
        coarse.dtype in FLOATS and bool((np.abs(_ROUND[coarse.dtype](fine.values) - coarse.values) <= _SUM_ERROR).all())
        for coarse, fine in ((ours, theirs), (theirs, ours))
    )


def _coding_error(ours: SampledTensor, theirs: SampledTensor) -> Floats:
    """Of the values of block types in a sample, which are float16 there, and of scales that are float16 in a file."""
    largest: Floats = np.maximum(np.abs(ours.values), np.abs(theirs.values))
    return np.float32(_SUM_ERROR) + largest * np.float32(2.0**-10)


def _half_level(levels: _Levels, ours: SampledTensor, theirs: SampledTensor) -> Floats:
    """Half the distance between two levels, for each value: of the two tensors, the one with the wider range counts."""
    groups = min(levels.group, len(ours.values))
    wide = [_range(tensor.values, groups, symmetric=levels.symmetric) for tensor in (ours, theirs)]
    half: Floats = (np.maximum(*wide) / (2 * levels.per_range)).astype(np.float32)
    return half


def _range(values: Floats, group: int, *, symmetric: bool) -> Floats:
    """The range of the values that share a scale, [len(values)]."""
    whole = len(values) // group * group
    rows = values[:whole].reshape(-1, group)
    high, low = np.maximum(rows.max(axis=1), 0), np.minimum(rows.min(axis=1), 0)
    ranges = 2 * np.maximum(high, -low) if symmetric else high - low
    return np.pad(np.repeat(ranges, group), (0, len(values) - whole), mode="edge").astype(np.float32)


def _to_float32(values: Floats) -> Floats:
    return values


def _to_float16(values: Floats) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _to_bfloat16(values: Floats) -> NDArray[Any]:
    """Rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


_ROUND: Mapping[str, Callable[[Floats], NDArray[Any]]] = {
    "F32": _to_float32,
    "F16": _to_float16,
    "BF16": _to_bfloat16,
}
