"""Linears whose weights are 8-bit integers; those that get the same input are one product."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cpu_kernels.blocks import HALF, STEP
from cpu_kernels.routine import Deltas
from server.quantization.kernels import Kernel
from server.quantization.native import NativeKernel
from server.quantization.rows import pieces


class PackedProduct:
    """The product of several linears that a model calls with the same input, one after another.

    The first that is called computes all; the others take their part if they get the very same tensor. Where there are
    ``deltas``, they are in it.
    """

    def __init__(self, kernel: Kernel, sizes: Sequence[int]) -> None:
        self._kernel, self._sizes = kernel, list(sizes)
        self.deltas: Deltas | None = None
        self._x: torch.Tensor | None = None
        self._y: list[torch.Tensor | None] = []

    @property
    def sizes(self) -> Sequence[int]:
        """Outputs of each linear."""
        return self._sizes

    @property
    def takes_deltas(self) -> bool:
        """Whether its kernel adds adapters' deltas: inputs and outputs are whole tiles."""
        kernel = self._kernel
        whole = isinstance(kernel, NativeKernel) and kernel.adds_deltas and kernel.num_inputs % STEP == 0
        return whole and all(size % HALF == 0 for size in self._sizes)

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Of linear ``number``: x [..., in] -> [..., out], the caller's to write into."""
        if len(self._sizes) == 1:
            return self._compute(x)
        if x is not self._x or self._y[number] is None:
            self._x, self._y = x, list(self._compute(x).split(self._sizes, -1))
        mine: torch.Tensor | None = self._y[number]
        self._y[number] = None
        if not any(part is not None for part in self._y):
            self._x, self._y = None, []
        assert mine is not None
        return mine

    def gated(self, numbers: tuple[int, int], x: torch.Tensor, *, by_gelu: bool) -> torch.Tensor | None:
        """silu, or gelu, of the first linear's result times the second's, of which nothing else is kept.

        x [..., in] -> [..., out]. One linear that has both, one behind the other, is twice the same. None where this
        product is not of those two alone, or its kernel does not gate.
        """
        kernel = self._kernel
        if not isinstance(kernel, NativeKernel) or not kernel.can_gate or x.dtype != torch.float32 or not x.numel():
            return None
        if self._sizes not in ([kernel.num_outputs], [kernel.num_outputs // 2] * 2):
            return None
        if numbers != (0, len(self._sizes) - 1):
            return None
        return kernel.gated(x, self._added(x), by_gelu=by_gelu)

    def in_floats(self, number: int) -> torch.Tensor:
        """The weight of linear ``number``, float32 [out, in]."""
        part: torch.Tensor = self._kernel.in_floats().split(self._sizes)[number]
        return part

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return self._compute(x.float()).to(x.dtype)
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], sum(self._sizes))
        kernel = self._kernel
        return kernel(x, self._added(x)) if isinstance(kernel, NativeKernel) else kernel(x)

    def _added(self, x: torch.Tensor) -> tuple[int, int]:
        return (0, 0) if self.deltas is None else self.deltas.of(x.numel() // x.shape[-1])


@dataclass(frozen=True)
class Original:
    """What is left of a weight that was made integers: its number format and a digest of its bytes."""

    dtype: torch.dtype
    digest: bytes

    @classmethod
    def of(cls, weight: torch.Tensor, *, done: Callable[[torch.Tensor], None] | None = None) -> Original:
        """Of a weight that is still whole; ``done`` is told each piece that was read."""
        digest = hashlib.sha256()
        for piece in pieces(weight.detach()):
            digest.update(piece.contiguous().view(torch.uint8).numpy().data)
            if done is not None:
                done(piece)
        return cls(weight.dtype, digest.digest())

    def equals(self, weight: torch.Tensor) -> bool:
        """Whether this is that weight."""
        return Original.of(weight.to(self.dtype)) == self


class Int8Linear(nn.Module):
    """Stands in the place of a linear. Its bias is a parameter; its ``weight`` is made anew whenever it is read."""

    def __init__(self, stock: nn.Module, original: Original, product: PackedProduct, number: int) -> None:
        super().__init__()
        self.bias = stock._parameters.get("bias")
        self.original = original
        self.product, self.number, self._transposed = product, number, isinstance(stock, Conv1D)
        self._stock = (without_weight(stock),)  # in a tuple, so that it is no submodule
        self.forward = partial(product.part, number)  # x [..., in] -> [..., out]

    @property
    def weight(self) -> torch.Tensor:
        """The weight these integers stand for, float32, in the stock layout."""
        weight = self.product.in_floats(self.number)
        return weight.t().contiguous() if self._transposed else weight

    def gated(self, up: nn.Module, x: torch.Tensor, *, by_gelu: bool) -> torch.Tensor | None:
        """This linear's units times those of ``up``, if both are one product: see ``PackedProduct.gated``."""
        if not isinstance(up, Int8Linear) or up.product is not self.product:
            return None
        return self.product.gated((self.number, up.number), x, by_gelu=by_gelu)

    def in_floats(self) -> nn.Module:
        """The stock module with these numbers."""
        return with_weight(self._stock[0], self.weight)

    def __getattr__(self, name: str) -> Any:
        """Whatever else modelling code reads of the stock module, such as its sizes."""
        if name == "_stock" or name.startswith("__"):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stock[0], name)


def products_with_deltas(modules: Mapping[str, nn.Module]) -> list[tuple[PackedProduct, list[tuple[str, int]]]]:
    """The products that can add adapters' deltas, each with its linears' names and numbers of outputs."""
    found: dict[PackedProduct, dict[int, str]] = {}
    for name, module in modules.items():
        if isinstance(module, Int8Linear) and module.product.takes_deltas:
            found.setdefault(module.product, {})[module.number] = name
    return [
        (product, [(names[number], size) for number, size in enumerate(product.sizes)])
        for product, names in found.items()
    ]


def without_weight(stock: nn.Module) -> nn.Module:
    """The module with a weight that takes no memory."""
    return with_weight(stock, torch.empty_like(stock.get_parameter("weight"), device="meta"))


def with_weight(stock: nn.Module, weight: torch.Tensor) -> nn.Module:
    """The module with another weight; all else is shared."""
    other = copy.copy(stock)
    parameters = {**stock._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    other.__dict__["_parameters"] = parameters
    return other


def joined(sizes: Sequence[int], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The biases end to end, zeros for those that are missing [sum of sizes]; None where all are."""
    if all(bias is None for bias in biases):
        return None
    parts = zip(sizes, biases, strict=True)
    return torch.cat([torch.zeros(size) if bias is None else bias.detach().float() for size, bias in parts])
