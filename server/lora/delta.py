"""One adapter's change of one module, as tensors ready for the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn

from server.adapters.content.signature import Kind

if TYPE_CHECKING:
    from server.lora.native import LoRATiles


@dataclass(frozen=True, eq=False)
class TokenEmbeddings:
    """New rows of an embedding or head: ``indices`` [tokens] ascending, ``rows`` [tokens, dim] float32."""

    indices: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, eq=False)
class ParameterDelta:
    """``left @ right`` is added to a parameter, in the parameter's dtype; ``left`` includes the scaling.

    Shapes: [experts, x, rank] and [experts, rank, y], or [x, rank] and [rank, y].
    """

    left: torch.Tensor
    right: torch.Tensor

    def added_to(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter with the delta, a new tensor."""
        add = torch.addmm if parameter.ndim == 2 else torch.baddbmm
        return add(parameter, self.left, self.right)


@dataclass(frozen=True, eq=False)
class LoRADelta:
    """One module's change. On a row x with the base's result y: ``y * scale + shift + x @ a @ b``.

    ``a`` [in, rank] and ``b`` [rank, out] are float32 with the scaling in b; for an embedding ``in`` is the tokens, x
    the row's token, and ``embed_scale`` multiplies what is added. ``scale`` and ``shift`` are [out]. ``own`` computes y
    if the adapter has parameters of its own (``own_names``). ``parameters``: low-rank deltas by parameter name;
    ``tokens``: replaced embedding rows; ``axis``: the row dimension of inputs and results. ``tiles`` replace ``a`` and
    ``b`` if the base's packed linear adds the delta.
    """

    kind: Kind
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    own: nn.Module | None = None
    own_names: tuple[str, ...] = ()
    tokens: TokenEmbeddings | None = None
    parameters: Mapping[str, ParameterDelta] = field(default_factory=dict)
    embed_scale: float = 1.0
    axis: int = 1
    tiles: LoRATiles | None = None

    @cached_property
    def plain(self) -> bool:
        """Whether the change is a low-rank delta and nothing else."""
        others = (self.scale, self.shift, self.own, self.tokens)
        low_rank = self.a is not None or self.tiles is not None
        return low_rank and not self.parameters and all(other is None for other in others)

    @property
    def finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of the adapter, none of the base."""
        for tensor in (self.a, self.b, self.scale, self.shift):
            if tensor is not None:
                yield tensor
        if self.tokens is not None:
            yield from (self.tokens.indices, self.tokens.rows)
        if self.tiles is not None:
            yield self.tiles.memory
        for delta in self.parameters.values():
            yield from (delta.left, delta.right)
        if self.own is not None:
            yield from (self.own.get_parameter(name) for name in self.own_names)


@runtime_checkable
class AddsParameterDeltas(Protocol):
    """A module with quantized parameters, to whose products low-rank deltas of them are added."""

    def with_deltas(self, deltas: Mapping[str, ParameterDelta], *inputs: Any, **named: Any) -> Any:
        """The module's result with these deltas, by parameter."""


def dequantized(module: nn.Module) -> nn.Module:
    """The module with float parameters: a new one if the base has it quantized."""
    dequantize = getattr(module, "dequantized", None)
    return module if dequantize is None else dequantize()
