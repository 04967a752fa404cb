"""What an adapter does to one module, as entries of its weights file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from base_files.safetensors_header import TensorEntry
from server.adapters.content.signature import ModuleShape


@dataclass(frozen=True)
class LowRank:
    """A delta ``scaling * B @ A`` as PEFT stores it: A [rank, in], B [out, rank], those of all experts end to end.

    ``swapped`` says that it is the delta of a weight stored [in, out], so that B's rows are the module's inputs.
    """

    a: TensorEntry
    b: TensorEntry
    rank: int
    scaling: float
    swapped: bool = False


@dataclass(frozen=True)
class TokenRows:
    """New rows [tokens, dim] for some tokens of an embedding or head."""

    rows: TensorEntry
    indices: tuple[int, ...]


@dataclass(frozen=True)
class ModulePlan:
    """One module's change: a low-rank delta, DoRA's magnitude, a bias of B, parameters of its own, rows for tokens.

    ``parameters`` are low-rank deltas of parameters that no linear holds, as those of experts.
    """

    shape: ModuleShape
    low_rank: LowRank | None = None
    magnitude: TensorEntry | None = None
    lora_bias: TensorEntry | None = None
    own: Mapping[str, TensorEntry] = field(default_factory=dict)
    tokens: TokenRows | None = None
    parameters: Mapping[str, LowRank] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        """The rank of each delta."""
        return [one.rank for one in (self.low_rank, *self.parameters.values()) if one is not None]

    @property
    def composable(self) -> bool:
        """Whether it is a plain low-rank delta."""
        return self == ModulePlan(self.shape, self.low_rank)

    @property
    def replaced(self) -> Mapping[str, TensorEntry]:
        """Parameters kept whole: all of its own, but for a linear's bias alone, which is a shift of the result."""
        return {} if self.shape.kind == "linear" and "weight" not in self.own else self.own

    @property
    def shifted(self) -> bool:
        """Whether a vector is added to a linear's result: another bias, B's, or one that DoRA does not scale."""
        biased = "bias" in self.shape.parameters
        other_bias = "bias" in self.own and not self.replaced
        return self.shape.kind == "linear" and (
            other_bias or self.lora_bias is not None or (biased and self.magnitude is not None)
        )

    def tensor_bytes(self) -> Iterator[tuple[str, int]]:
        """Bytes in memory by tensor; two modules that share one name the same."""
        for one in (self.low_rank, *self.parameters.values()):
            if one is not None:
                size = 4 if one is self.low_rank else self.shape.itemsize
                yield one.a.name, size * math.prod(one.a.shape)
                yield one.b.name, size * math.prod(one.b.shape)
        for name, entry in self.replaced.items():
            yield entry.name, self.shape.num_bytes(name)
        if self.tokens is not None:
            yield self.tokens.rows.name, 4 * math.prod(self.tokens.rows.shape) + 8 * len(self.tokens.indices)

    @property
    def vector_bytes(self) -> int:
        """Bytes in memory of DoRA's scale and of the shift."""
        return 4 * self.shape.size[1] * ((self.magnitude is not None) + self.shifted)
