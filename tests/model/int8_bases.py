"""The kernels of this machine, and the embedded base with int8 linears beside the same in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch

from benchmarks.parts.perplexity import LENGTH, Comparison, Reader, compare, own_texts
from cpu_kernels.int8_weights import QMAX, Int8Rows
from cpu_kernels.kernels import Kernels, native_linears
from cpu_kernels.linear import FbgemmLinear, OnednnLinear, quieten_deprecations
from server.model.loader import Base, load_base
from tests.instruction_sets import each_product

quieten_deprecations()
LINEARS = [FbgemmLinear.name, OnednnLinear.name, *each_product()]
"""Names of what multiplies integers; those that this CPU lacks are deselected."""
TWO_LINEARS = list(dict.fromkeys([FbgemmLinear.name, *native_linears()[:1]]))
"""The one that is everywhere and the native one that is chosen here, for what whole models do: all are alike."""

NUM_WINDOWS = 12
MOST_EXCESS = 0.01
"""Of perplexity above float32's, on conversations such as micro was trained on. On a text that surprises it (of the
licence its perplexity is 116) chance alone makes a percent either way."""
MOST_DIVERGENCE = 0.01
"""Nats a token between int8's and float32's probabilities; measured: 0.0017 and 0.0031, with half the levels 0.0025 and
0.0045."""


def rows_for(kernels: Kernels, weights: Sequence[torch.Tensor]) -> Int8Rows:
    """Weights in integers that a kernel multiplies exactly, as the quantizer makes them."""
    return Int8Rows.of(weights, qmax=kernels.qmax)


def rounding(kernels: Kernels, share: float) -> float:
    """What rounding a kernel's weights alone may change, where it is ``share`` with 127 levels."""
    return share * QMAX / kernels.qmax


def rounding_of_both(kernels: Kernels, share: float) -> float:
    """What rounding weights and activations may change, where it is ``share`` with 127 levels of both.

    The two errors are independent and alike, and activations have 127 levels in every kernel.
    """
    return share * math.hypot(1.0, QMAX / kernels.qmax) / math.sqrt(2.0)


def load_micro(quantization: str) -> Base:
    """As the server loads it; without quantization in float32."""
    return load_base(
        "micro", name="micro", device="cpu", dtype="float32", max_model_len=LENGTH, quantization=quantization
    )


@functools.cache
def micro_in_floats() -> Reader:
    """What its int8 forms are compared with; made once."""
    return Reader(load_micro("none"))


def compare_micro() -> Mapping[str, Comparison]:
    """By text, int8 with float32."""
    int8, floats = Reader(load_micro("int8")), micro_in_floats()
    texts = own_texts(floats.base.tokenizer, num_windows=NUM_WINDOWS)
    return {name: compare(int8, floats, windows) for name, windows in texts.items()}


def assert_micro_understands() -> None:
    """Its int8 form is near enough to its float32 one."""
    found = compare_micro()
    assert found["conversations"].excess < MOST_EXCESS, found
    assert all(one.divergence < MOST_DIVERGENCE for one in found.values()), found
