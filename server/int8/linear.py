"""Linears whose weights are 8-bit integers; those that get the same input are one product."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.int8.kernels import Kernel
from server.int8.native import NativeKernel
from server.int8.rows import pieces


class PackedProduct:
    """The product of several linears that a model calls with the same input, one after another.

    The first that is called computes all; the others take their part if they get the very same tensor.
    """

    def __init__(self, kernel: Kernel, sizes: Sequence[int]) -> None:
        self._kernel, self._sizes = kernel, list(sizes)
        self._x: torch.Tensor | None = None
        self._y: list[torch.Tensor | None] = []

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
        return kernel.gated(x, by_gelu=by_gelu)

    def in_floats(self, number: int) -> torch.Tensor:
        """The weight of linear ``number``, float32 [out, in]."""
        part: torch.Tensor = self._kernel.in_floats().split(self._sizes)[number]
        return part

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return self._compute(x.float()).to(x.dtype)
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], sum(self._sizes))
        return self._kernel(x)


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
        self._product, self._number, self._transposed = product, number, isinstance(stock, Conv1D)
        self._stock = (without_weight(stock),)  # in a tuple, so that it is no submodule
        self.forward = partial(product.part, number)  # x [..., in] -> [..., out]

    @property
    def weight(self) -> torch.Tensor:
        """The weight these integers stand for, float32, in the stock layout."""
        weight = self._product.in_floats(self._number)
        return weight.t().contiguous() if self._transposed else weight

    def gated(self, up: nn.Module, x: torch.Tensor, *, by_gelu: bool) -> torch.Tensor | None:
        """This linear's units times those of ``up``, if both are one product: see ``PackedProduct.gated``."""
        if not isinstance(up, Int8Linear) or up._product is not self._product:
            return None
        return self._product.gated((self._number, up._number), x, by_gelu=by_gelu)

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
