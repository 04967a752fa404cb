"""What this machine could do at best, measured now: reading memory, and products of matrices of a model's shapes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

Shape = tuple[int, int]
"""A linear: inputs, outputs."""


def best_seconds(call: Callable[[], object], *, budget: float = 1.0) -> float:
    """The shortest of as many calls as fit into ``budget`` seconds, three at least: noise only ever adds."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < budget:
        since = time.perf_counter()
        call()
        times.append(time.perf_counter() - since)
    return min(times)


def read_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes in a second, of a sum over memory that no cache of the machine's own holds."""
    memory = torch.ones(num_bytes // 4)
    return num_bytes / best_seconds(memory.sum, budget=2.0)


def product_rates(shapes: Mapping[str, Shape], num_rows: int) -> dict[str, float]:
    """Operations in a second, 2 for each multiply-add, over one layer's linears, by number format.

    A format that this machine's torch has no kernel for is left out.
    """
    names = ["float32", "bfloat16", *(["int8"] if _has_int8() else [])]
    return {name: _rate(name, shapes, num_rows) for name in names}


@torch.inference_mode()
def _rate(name: str, shapes: Mapping[str, Shape], num_rows: int) -> float:
    calls = [_product(name, torch.randn(out, into), torch.randn(num_rows, into)) for into, out in shapes.values()]
    operations = sum(2 * num_rows * into * out for into, out in shapes.values())

    def layer() -> None:
        for call in calls:
            call()

    return operations / best_seconds(layer)


def _product(name: str, weight: torch.Tensor, x: torch.Tensor) -> Callable[[], object]:
    """weight [out, in] and x [rows, in], float32: a call that multiplies them in a number format."""
    if name == "int8":
        return _int8(weight, x)
    dtype = getattr(torch, name)
    weight, x = weight.to(dtype), x.to(dtype)
    return lambda: F.linear(x, weight)


def _int8(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], object]:
    """FBGEMM's product with scales that are given: [rows, in] float -> [rows, out] float."""
    quantized: Any = torch.ops.quantized
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the type of a packed weight is marked as going; nothing has taken its place
        scales = weight.abs().amax(1).double() / 127
        packed = quantized.linear_prepack(
            torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8), None
        )
    scale, zero = torch.tensor(1 / 32), torch.tensor(128)
    return lambda: quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, scale, zero, packed)


def _has_int8() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines
