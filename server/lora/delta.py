"""What one adapter does to one module, as tensors ready for the engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

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
    """``left @ right`` to be added to a parameter, in its format, the scaling in ``left``.

    [experts, x, rank] and [experts, rank, y], or [x, rank] and [rank, y].
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
    where the adapter has parameters of its own (``own_names``); ``parameters`` has deltas of those it is to be called
    with, ``tokens`` rows that go in the place of others. ``axis`` is that of the rows in inputs and results. Where the
    base's product adds the delta itself, ``tiles`` stand in the place of ``a`` and ``b``.
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
        """Whether it is a low-rank delta and nothing else."""
        others = (self.scale, self.shift, self.own, self.tokens)
        low_rank = self.a is not None or self.tiles is not None
        return low_rank and not self.parameters and all(one is None for one in others)

    @property
    def finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that is this adapter's own."""
        for one in (self.a, self.b, self.scale, self.shift):
            if one is not None:
                yield one
        if self.tokens is not None:
            yield from (self.tokens.indices, self.tokens.rows)
        if self.tiles is not None:
            yield self.tiles.memory
        for delta in self.parameters.values():
            yield from (delta.left, delta.right)
        if self.own is not None:
            yield from (self.own.get_parameter(name) for name in self.own_names)


def in_floats(module: nn.Module) -> nn.Module:
    """A module of the base that has its parameters, made anew where the base keeps them as integers."""
    made = getattr(module, "in_floats", None)
    return module if made is None else made()


def with_parameters(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The same module with other parameters; all else is shared, and the module itself stays as it is."""
    other = copy.copy(module)
    own = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    other.__dict__["_parameters"] = {**module._parameters, **own}
    return other
