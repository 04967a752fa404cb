"""What this machine could do at best, measured now: reading memory, and products of matrices of a model's shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from cpu_kernels.int8_weights import Int8Rows
from cpu_kernels.linear import FbgemmLinear, OnednnLinear, choose_torch_linear

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
    return operations(shapes, num_rows) / best_seconds(layers(name, shapes, num_rows))


def operations(shapes: Mapping[str, Shape], num_rows: int) -> int:
    """Of the products of so many rows with these, 2 for each multiply-add."""
    return sum(2 * num_rows * into * out for into, out in shapes.values())


def layers(name: str, shapes: Mapping[str, Shape], num_rows: int, count: int = 1) -> Callable[[], None]:
    """A call of the products of so many layers, each with weights of its own, in a number format."""
    calls = [
        _product(name, torch.randn(out, into), torch.randn(num_rows, into))
        for _ in range(count)
        for into, out in shapes.values()
    ]

    def multiply() -> None:
        for call in calls:
            call()

    return multiply


def _product(name: str, weight: torch.Tensor, x: torch.Tensor) -> Callable[[], object]:
    """weight [out, in] and x [rows, in], float32: a call that multiplies them in a number format."""
    if name == "int8":
        return _int8(weight, x)
    dtype = getattr(torch, name)
    weight, x = weight.to(dtype), x.to(dtype)
    return lambda: F.linear(x, weight)


def _int8(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], object]:
    """The faster of torch's kernels, without quantizing the activations: that is no product."""
    linear = choose_torch_linear()
    assert linear is not None
    packed = linear(Int8Rows.of([weight]))
    if isinstance(packed, OnednnLinear):
        integers = torch.randint(0, 256, x.shape, dtype=torch.uint8)
        return lambda: packed.multiply(integers)
    normalized = x / x.abs().amax()
    assert isinstance(packed, FbgemmLinear)
    return lambda: packed.multiply(normalized)


def _has_int8() -> bool:
    return choose_torch_linear() is not None
