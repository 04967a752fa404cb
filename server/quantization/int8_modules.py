"""Linears and embeddings whose weights are 8-bit integers; linears that get the same input are one fused linear."""

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

from cpu_kernels.int8_weights import Int8Rows, pieces
from cpu_kernels.linear import NO_DELTAS, Deltas, PackedLinear


class FusedLinear:
    """Several linears that a model calls with the same input, one after another, computed by one packed weight.

    Contract: the first ``part`` that is asked for computes the outputs of all, and keeps those of the others. Another
    part is taken from what is kept only if it is asked for with *the very same tensor object*, and only once: it then
    belongs to its caller. With any other tensor, or for the second time, all is computed anew. So the input must not
    be changed in place between the calls of a group, and the object is for one thread. What is kept is freed when every
    part was taken. Where there are ``deltas``, they are added in the same call.
    """

    def __init__(self, linear: PackedLinear, sizes: Sequence[int]) -> None:
        self._linear, self._sizes = linear, list(sizes)
        self.deltas: Deltas | None = None
        self._x: torch.Tensor | None = None
        self._y: list[torch.Tensor | None] = []

    @property
    def sizes(self) -> Sequence[int]:
        return self._sizes

    @property
    def takes_deltas(self) -> bool:
        """Whether its kernel adds adapters' deltas to each of the linears."""
        return self._linear.can_add_deltas(self._sizes)

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Of linear ``number``: x [..., in] -> [..., out], the caller's to write into."""
        if len(self._sizes) == 1:
            return self._compute(x)
        if x is not self._x or self._y[number] is None:
            self._x, self._y = x, list(self._compute(x).split(self._sizes, -1))
        part = self._y[number]
        self._y[number] = None
        if all(other is None for other in self._y):
            self._x, self._y = None, []
        assert part is not None
        return part

    def forget(self) -> None:
        """Free what is kept for parts that will not be asked for: the step has failed."""
        self._x, self._y = None, []

    def gated(self, numbers: tuple[int, int], x: torch.Tensor, *, by_gelu: bool) -> torch.Tensor | None:
        """silu, or gelu, of the first linear's result times the second's, of which nothing else is kept.

        x [..., in] -> [..., out]. One linear that has both, one behind the other, is twice the same. None where this
        linear is not of those two alone, or its kernel does not gate.
        """
        linear = self._linear
        if linear.gated is None or x.dtype != torch.float32 or not x.numel():
            return None
        if self._sizes not in ([linear.num_outputs], [linear.num_outputs // 2] * 2):
            return None
        if numbers != (0, len(self._sizes) - 1):
            return None
        return linear.gated(x, self._delta_addresses(x), by_gelu=by_gelu)

    def in_floats(self, number: int) -> torch.Tensor:
        """The weight of linear ``number``, float32 [out, in]."""
        part: torch.Tensor = self._linear.in_floats().split(self._sizes)[number]
        return part

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return self._compute(x.float()).to(x.dtype)
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], sum(self._sizes))
        return self._linear(x, self._delta_addresses(x))

    def _delta_addresses(self, x: torch.Tensor) -> tuple[int, int]:
        return NO_DELTAS if self.deltas is None else self.deltas.of(x.numel() // x.shape[-1])


@dataclass(frozen=True)
class WeightDigest:
    """What is left of a weight that was made integers: its number format and a digest of its bytes."""

    dtype: torch.dtype
    digest: bytes

    @classmethod
    def of(cls, weight: torch.Tensor, *, done: Callable[[torch.Tensor], None] | None = None) -> WeightDigest:
        """Of a weight that is still whole; ``done`` is told each piece that was read."""
        digest = hashlib.sha256()
        for piece in pieces(weight.detach()):
            digest.update(piece.contiguous().view(torch.uint8).numpy().data)
            if done is not None:
                done(piece)
        return cls(weight.dtype, digest.digest())

    def equals(self, weight: torch.Tensor) -> bool:
        return WeightDigest.of(weight.to(self.dtype)) == self


class Int8Linear(nn.Module):
    """Stands in the place of a linear. Its bias is a parameter; its ``weight`` is made anew whenever it is read."""

    def __init__(self, stock: nn.Module, original: WeightDigest, fused: FusedLinear, number: int) -> None:
        super().__init__()
        self.bias = stock._parameters.get("bias")
        self.original = original
        self.fused, self.number, self._transposed = fused, number, isinstance(stock, Conv1D)
        self._stock = (without_weight(stock),)  # in a tuple, so that it is no submodule
        self.forward = partial(fused.part, number)  # x [..., in] -> [..., out]

    @property
    def weight(self) -> torch.Tensor:
        """The weight these integers stand for, float32, in the stock layout."""
        weight = self.fused.in_floats(self.number)
        return weight.t().contiguous() if self._transposed else weight

    def gated(self, up: nn.Module, x: torch.Tensor, *, by_gelu: bool) -> torch.Tensor | None:
        """This linear's units times those of ``up``, if both are one fused linear: see ``FusedLinear.gated``."""
        if not isinstance(up, Int8Linear) or up.fused is not self.fused:
            return None
        return self.fused.gated((self.number, up.number), x, by_gelu=by_gelu)

    def in_floats(self) -> nn.Module:
        return with_weight(self._stock[0], self.weight)

    def __getattr__(self, name: str) -> Any:
        """Whatever else modelling code reads of the stock module, such as its sizes."""
        if name == "_stock" or name.startswith("__"):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stock[0], name)


class Int8Embedding(nn.Module):
    """Stands in the place of an embedding; rows come out as ``dtype``, times the stock module's ``embed_scale``."""

    def __init__(self, stock: nn.Embedding, original: WeightDigest, rows: Int8Rows, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = stock.num_embeddings, stock.embedding_dim
        self.embed_scale = float(getattr(stock, "embed_scale", 1.0))
        self.original = original
        self._rows, self._dtype = rows, dtype
        self._scales = rows.scales * self.embed_scale
        self._stock = (without_weight(stock),)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., dim]."""
        return (self._rows.integers[ids] * self._scales[ids][..., None]).to(self._dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The weight these integers stand for, float32 [tokens, dim]."""
        return self._rows.in_floats()

    def in_floats(self) -> nn.Module:
        return with_weight(self._stock[0], self.weight)


def linears_with_deltas(modules: Mapping[str, nn.Module]) -> list[tuple[FusedLinear, list[tuple[str, int]]]]:
    """The fused linears that can add adapters' deltas, each with its linears' names and numbers of outputs."""
    found: dict[FusedLinear, dict[int, str]] = {}
    for name, module in modules.items():
        if isinstance(module, Int8Linear) and module.fused.takes_deltas:
            found.setdefault(module.fused, {})[module.number] = name
    return [
        (fused, [(names[number], size) for number, size in enumerate(fused.sizes)]) for fused, names in found.items()
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


def join_biases(sizes: Sequence[int], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The biases end to end, zeros for those that are missing [sum of sizes]; None where all are."""
    if all(bias is None for bias in biases):
        return None
    parts = zip(sizes, biases, strict=True)
    return torch.cat([torch.zeros(size) if bias is None else bias.detach().float() for size, bias in parts])
