"""Rotary position embeddings of a GGUF as transformers' ``rope_parameters``.

llama.cpp stores the scaling of Llama 3 and of longrope as tensors of factors, which divide the frequencies. What is
absent has llama.cpp's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.gguf.architectures import LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS
from base_files.gguf.metadata import MetadataReader
from base_files.tensors import StoredTensor

DEFAULT_THETA = 10000.0
_TYPES = ("none", "linear", "yarn", "longrope")
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0
_ORIGINAL_LENGTHS = (8192, *(1 << power for power in range(4, 21)))
_TOLERANCE = 1e-5

RopeParameters = dict[str, Any]


def rope_parameters(reader: MetadataReader, factors: Mapping[str, StoredTensor], head_dim: int) -> RopeParameters:
    """``factors`` are those of the tensors above that the file has. Raises ``ValueError``."""
    theta = reader.number("rope.freq_base", DEFAULT_THETA)
    if theta <= 1:
        raise ValueError(f"rope.freq_base is {theta:g}: it must be above 1")
    kind = reader.text("rope.scaling.type", "linear")
    if kind not in _TYPES:
        raise ValueError(f"rope.scaling.type is {kind!r:.40}; {', '.join(_TYPES)} are read")
    factor = _factor(reader)
    if factors:
        return _by_factors(reader, factors, theta, head_dim, kind=kind, factor=factor)
    if kind == "longrope":
        raise ValueError(f"rope.scaling.type is longrope, and {LONG_FACTORS} is missing")
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **_yarn(reader, factor)}
    if kind == "none" or factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _factor(reader: MetadataReader) -> float:
    """0 is llama.cpp's word for none; ``rope.scale_linear`` is the key's old name."""
    old = reader.number("rope.scale_linear", 0.0)
    return reader.number("rope.scaling.factor", old) or 1.0


def _yarn(reader: MetadataReader, factor: float) -> RopeParameters:
    original = _original_length(reader)
    parameters: RopeParameters = {
        "original_max_position_embeddings": original,
        "beta_fast": reader.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": reader.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if reader.number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise ValueError("rope.scaling.yarn_ext_factor is not 1, which transformers cannot compute")
    if reader.has("rope.scaling.yarn_attn_factor"):
        parameters["attention_factor"] = reader.number("rope.scaling.yarn_attn_factor")
    if reader.has("rope.scaling.attn_factor"):
        default = 0.1 * math.log(max(factor, 1.0)) + 1.0
        parameters["attention_factor"] = default * reader.number("rope.scaling.attn_factor")
    return parameters


def _original_length(reader: MetadataReader) -> int:
    """The context of the training before it was extended."""
    length = reader.integer("rope.scaling.original_context_length", reader.integer("context_length"))
    if length < 2:
        raise ValueError(f"the original context has {length} tokens: it must be 2 or more")
    return length


def _by_factors(
    reader: MetadataReader,
    factors: Mapping[str, StoredTensor],
    theta: float,
    head_dim: int,
    *,
    kind: str,
    factor: float,
) -> RopeParameters:
    """Scaling by tensors, which may not meet another one."""
    if kind == "yarn" or factor != 1:
        raise ValueError(f"it has {next(iter(factors))}, and a scaling of type {kind} by {factor:g} as well")
    values = {name: _read(tensor, head_dim) for name, tensor in factors.items()}
    if values.keys() == {LLAMA3_FACTORS}:
        return {"rope_theta": theta, **_llama3(values[LLAMA3_FACTORS], theta, head_dim)}
    if values.keys() != {LONG_FACTORS, SHORT_FACTORS}:
        raise ValueError(f"it has {' and '.join(values)}: {LONG_FACTORS} and {SHORT_FACTORS} belong together")
    return {"rope_theta": theta, **_longrope(reader, values)}


def _read(tensor: StoredTensor, head_dim: int) -> NDArray[Any]:
    if tensor.shape != (head_dim // 2,):
        raise ValueError(f"{tensor.name} has the shape {list(tensor.shape)} instead of [{head_dim // 2}]")
    values = tensor.read().astype(np.float64)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"{tensor.name} holds numbers that are not above 0")
    return values


def _llama3(found: NDArray[Any], theta: float, head_dim: int) -> RopeParameters:
    """The parameters whose factors are those in the file, as Llama 3.1 introduced them."""
    factor = float(found[-1])
    if np.allclose(found, 1, rtol=0, atol=_TOLERANCE):
        return {"rope_type": "default"}
    for original in _ORIGINAL_LENGTHS:
        if np.allclose(llama3_factors(theta, head_dim, factor, original), found, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW_FREQ_FACTOR,
                "high_freq_factor": _HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": original,
            }
    raise ValueError(
        f"the factors in {LLAMA3_FACTORS}, from {found[0]:g} to {found[-1]:g}, are those of no known scaling of Llama 3"
    )


def llama3_factors(theta: float, head_dim: int, factor: float, original: int) -> NDArray[Any]:
    """What divides the frequencies, [head_dim / 2]: 1 for short waves, ``factor`` for long ones, and between."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = original * frequencies / (2 * np.pi)
    smooth = np.clip((turns - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR), 0, 1)
    result: NDArray[Any] = 1 / ((1 - smooth) / factor + smooth)
    return result


def _longrope(reader: MetadataReader, values: Mapping[str, NDArray[Any]]) -> RopeParameters:
    length = reader.integer("context_length")
    original = _original_length(reader)
    parameters: RopeParameters = {
        "rope_type": "longrope",
        "long_factor": [_shortest(value) for value in values[LONG_FACTORS]],
        "short_factor": [_shortest(value) for value in values[SHORT_FACTORS]],
        "original_max_position_embeddings": original,
    }
    attention_factor = reader.number("rope.scaling.attn_factor", 1.0)
    growth = max(length / original, 1.0)
    if not math.isclose(attention_factor, math.sqrt(1 + math.log(growth) / math.log(original)), rel_tol=1e-6):
        parameters["attention_factor"] = attention_factor
    return parameters


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))
