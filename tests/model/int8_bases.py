"""The kernels of this machine, and the embedded base with int8 linears beside the same in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch

from benchmarks.parts.perplexity import LENGTH, Comparison, Reader, compare, own_texts
from server.model.loader import Base, load_base
from server.quantization.kernels import (
    FbgemmKernel,
    Kernel,
    OnednnKernel,
    choose_torch_kernel,
    weight_levels,
)
from server.quantization.native import native_kernels
from server.quantization.rows import LEVELS, Int8Rows
from tests.instruction_sets import each_product

choose_torch_kernel()  # it quietens torch's word on its quantized tensors, once
KERNELS = [FbgemmKernel.name, OnednnKernel.name, *each_product()]
"""Names of all kernels; those that this CPU lacks are deselected."""
TWO_KERNELS = list(dict.fromkeys([FbgemmKernel.name, *list(native_kernels())[:1]]))
"""The one that is everywhere and the routine that is chosen here, for what whole models do: all products are alike."""

NUM_WINDOWS = 12
MOST_EXCESS = 0.01
"""Of perplexity above float32's, on conversations such as micro was trained on. On a text that surprises it (of the
licence its perplexity is 116) chance alone makes a percent either way."""
MOST_DIVERGENCE = 0.01
"""Nats a token between int8's and float32's probabilities; measured: 0.0017 and 0.0031, with half the levels 0.0025 and
0.0045."""


def kernel_named(name: str) -> type[Kernel]:
    """One of ``KERNELS``."""
    kernels: dict[str, type[Kernel]] = {FbgemmKernel.name: FbgemmKernel, OnednnKernel.name: OnednnKernel}
    return (kernels | dict(native_kernels()))[name]


def rows_for(kernel: type[Kernel], weights: Sequence[torch.Tensor]) -> Int8Rows:
    """Weights in the levels that a kernel multiplies exactly, as the quantizer makes them."""
    return Int8Rows.of(weights, levels=weight_levels(kernel))


def rounding(kernel: type[Kernel], share: float) -> float:
    """What rounding a kernel's weights alone may change, where it is ``share`` with 127 levels."""
    return share * LEVELS / weight_levels(kernel)


def rounding_of_both(kernel: type[Kernel], share: float) -> float:
    """What rounding weights and activations may change, where it is ``share`` with 127 levels of both.

    The two errors are independent and alike, and activations have 127 levels in every kernel.
    """
    return share * math.hypot(1.0, LEVELS / weight_levels(kernel)) / math.sqrt(2.0)


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
