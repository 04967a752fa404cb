"""Int8 linears and embeddings; linears that receive the same input share one packed weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cpu_kernels.int8_weights import Int8Rows, Reader, pieces
from cpu_kernels.linear import NO_DELTAS, Deltas, PackedLinear
from server.module_proxy import ModuleProxy, with_parameters


class FusedLinear:
    """Linears that a model calls one after another with the same input, computed by one packed weight.

    Contract: the first ``part`` computes the outputs of all linears and caches those of the others. A cached output is
    returned only for *the same tensor object* as input, and only once: it then belongs to its caller. For another
    tensor, or the second time, all outputs are computed again. So the input must not be changed in place between the
    calls of a group, and the object is for one thread. The cache is freed when every output was taken. ``deltas``, if
    any, are added in the same call.
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
        """The output of linear ``number``: x [..., in] -> [..., out], the caller's to write into."""
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
        """Free cached outputs after a failed step."""
        self._x, self._y = None, []

    def gated(self, numbers: tuple[int, int], x: torch.Tensor, *, by_gelu: bool) -> torch.Tensor | None:
        """``silu(gate(x)) * up(x)``, or with GELU: x [..., in] -> [..., out].

        ``numbers`` are gate and up; equal ones mean one linear with the outputs of both, end to end. None if this
        weight has other linears, or its kernel does not gate.
        """
        linear = self._linear
        if linear.gated is None or x.dtype != torch.float32 or not x.numel():
            return None
        if self._sizes not in ([linear.num_outputs], [linear.num_outputs // 2] * 2):
            return None
        if numbers != (0, len(self._sizes) - 1):
            return None
        return linear.gated(x, self._delta_addresses(x), by_gelu=by_gelu)

    def dequantized(self, number: int) -> torch.Tensor:
        """The dequantized weight of linear ``number``, float32 [out, in]."""
        weight: torch.Tensor = self._linear.in_floats().split(self._sizes)[number]
        return weight

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
    """Dtype and digest of a weight before quantization."""

    dtype: torch.dtype
    digest: bytes

    @classmethod
    def of(cls, weight: torch.Tensor, *, read: Reader = pieces) -> WeightDigest:
        """The digest of a stock weight; ``read`` reads one that is not all in memory."""
        digest = hashlib.sha256()
        for piece in read(weight.detach()):
            digest.update(piece.contiguous().view(torch.uint8).numpy().data)
        return cls(weight.dtype, digest.digest())

    def equals(self, weight: torch.Tensor) -> bool:
        return WeightDigest.of(weight.to(self.dtype)) == self


class Int8Linear(ModuleProxy):
    """A quantized linear. Its bias is a parameter; its ``weight`` is dequantized whenever it is read."""

    def __init__(self, stock: nn.Module, original: WeightDigest, fused: FusedLinear, number: int) -> None:
        super().__init__(without_weights(stock))
        self._parameters["bias"] = stock._parameters.get("bias")
        self.original = original
        self.fused, self.number, self._transposed = fused, number, isinstance(stock, Conv1D)
        self.forward = partial(fused.part, number)  # x [..., in] -> [..., out]

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight, float32, in the stock layout."""
        weight = self.fused.dequantized(self.number)
        return weight.t().contiguous() if self._transposed else weight

    def gated(self, up: nn.Module, x: torch.Tensor, *, by_gelu: bool) -> torch.Tensor | None:
        """``FusedLinear.gated`` of this gate and ``up``; None unless both are in one fused linear."""
        if not isinstance(up, Int8Linear) or up.fused is not self.fused:
            return None
        return self.fused.gated((self.number, up.number), x, by_gelu=by_gelu)

    def dequantized(self) -> nn.Module:
        """The stock module with the weight that the integers stand for."""
        return with_parameters(self._stock[0], {"weight": self.weight})


class Int8Embedding(ModuleProxy):
    """A quantized embedding; its rows are returned as ``dtype``, times the stock module's ``embed_scale``."""

    def __init__(self, stock: nn.Embedding, original: WeightDigest, rows: Int8Rows, dtype: torch.dtype) -> None:
        super().__init__(without_weights(stock))
        self.embed_scale = float(getattr(stock, "embed_scale", 1.0))
        self.original = original
        self._rows, self._dtype = rows, dtype
        self._scales = rows.scales * self.embed_scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., dim]."""
        return (self._rows.integers[ids] * self._scales[ids][..., None]).to(self._dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight, float32 [tokens, dim]."""
        return self._rows.in_floats()

    def dequantized(self) -> nn.Module:
        """The stock module with the weight that the integers stand for."""
        return with_parameters(self._stock[0], {"weight": self.weight})


def linears_with_deltas(modules: Mapping[str, nn.Module]) -> list[tuple[FusedLinear, list[tuple[str, int]]]]:
    """The fused linears that can add adapters' deltas, each with its linears' names and numbers of outputs."""
    found: dict[FusedLinear, dict[int, str]] = {}
    for name, module in modules.items():
        if isinstance(module, Int8Linear) and module.fused.takes_deltas:
            found.setdefault(module.fused, {})[module.number] = name
    return [
        (fused, [(names[number], size) for number, size in enumerate(fused.sizes)]) for fused, names in found.items()
    ]


def without_weights(stock: nn.Module, names: Sequence[str] = ("weight",)) -> nn.Module:
    """A copy of the module whose weights are on the ``meta`` device, without memory."""
    return with_parameters(stock, {name: torch.empty_like(stock.get_parameter(name), device="meta") for name in names})


def join_biases(sizes: Sequence[int], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The biases end to end [sum of sizes], zeros for missing ones; None if all are missing."""
    if all(bias is None for bias in biases):
        return None
    parts = zip(sizes, biases, strict=True)
    return torch.cat([torch.zeros(size) if bias is None else bias.detach().float() for size, bias in parts])
