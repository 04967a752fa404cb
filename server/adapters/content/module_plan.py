"""What an adapter does to one module: which tensor of its weights file is which delta, and with what scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from base_files.safetensors_header import TensorEntry
from server.adapters.content.peft_config import LoRAConfig
from server.adapters.content.signature import ModuleShape
from server.adapters.content.tensor_names import ModuleTensors


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
        return [one.rank for one in (self.low_rank, *self.parameters.values()) if one is not None]

    @property
    def composable(self) -> bool:
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


def module_plan(module: str, tensors: ModuleTensors, config: LoRAConfig, shape: ModuleShape) -> ModulePlan:
    """The plan, whose shapes are still to be checked. Raises ``ValueError`` where tensors are missing or too many."""
    targets = target_parameters_of(module, config, shape) if tensors.levels else []
    low_rank = None if targets else _low_rank(module, tensors, config, shape)
    parameters = _parameters(module, tensors, targets, config, shape)
    if shape.kind != "rows" and parameters:
        (low_rank,), parameters = parameters.values(), {}
    tokens = None if tensors.tokens is None else TokenRows(tensors.tokens, config.tokens_of(module))
    return ModulePlan(shape, low_rank, tensors.magnitude, tensors.lora_bias, tensors.own, tokens, parameters)


def target_parameters_of(module: str, config: LoRAConfig, shape: ModuleShape) -> list[str]:
    """Parameters of the module that ``target_parameters`` names, in the order in which PEFT wraps them."""
    matrices = [parameter for parameter, size in shape.parameters.items() if len(size) in (2, 3)]
    full = {parameter: config.trained_name(f"{module}.{parameter}") for parameter in matrices}
    return [
        parameter
        for parameter, name in full.items()
        if any(name == end or name.endswith("." + end) for end in config.target_parameters)
    ]


def _low_rank(module: str, tensors: ModuleTensors, config: LoRAConfig, shape: ModuleShape) -> LowRank | None:
    if tensors.levels and tensors.embedding:
        raise ValueError(f"{module} has tensors of a linear and of an embedding")
    if not tensors.levels and not tensors.embedding:
        return None
    if tensors.embedding and shape.kind != "embedding":
        raise ValueError(f"{module} has tensors of an embedding, and is none in the base: was it trained on another?")
    if tensors.levels and shape.kind != "linear":
        raise ValueError(
            f"{module} has a delta, and is no linear layer in the base, nor does target_parameters in "
            "adapter_config.json name a parameter of it"
        )
    if tensors.levels and set(tensors.levels) != {0}:
        raise ValueError(f"{module} has nested deltas, and target_parameters in adapter_config.json does not name them")
    a, b = _pair(module, tensors.levels[0] if tensors.levels else tensors.embedding)
    return LowRank(a, b, a.shape[0] if a.shape else 0, config.scaling(module))


def _parameters(
    module: str, tensors: ModuleTensors, targets: list[str], config: LoRAConfig, shape: ModuleShape
) -> dict[str, LowRank]:
    """PEFT nests a wrapper per parameter, the first innermost; the last has no ``base_layer`` in its tensors' names."""
    if not targets:
        return {}
    if set(tensors.levels) != set(range(len(targets))):
        raise ValueError(
            f"{module} has deltas for {len(tensors.levels)} parameters, and target_parameters in adapter_config.json "
            f"names {len(targets)} of it ({', '.join(targets)})"
        )
    found = {}
    for depth, parameter in enumerate(reversed(targets)):
        a, b = _pair(f"{module}.{parameter}", tensors.levels[depth])
        rank = (a.shape[0] if a.shape else 0) // num_experts(shape, parameter)
        swapped = shape.kind != "rows" and shape.weight_is_in_out
        found[parameter] = LowRank(a, b, rank, config.scaling(f"{module}.{parameter}"), swapped)
    return found


def _pair(name: str, half: Mapping[str, TensorEntry]) -> tuple[TensorEntry, TensorEntry]:
    if missing := [letter for letter in "AB" if letter not in half]:
        raise ValueError(f"{name} has no tensor {missing[0]} of its delta: A or B is missing")
    return half["A"], half["B"]


def num_experts(shape: ModuleShape, parameter: str) -> int:
    size = shape.parameters[parameter]
    return size[0] if len(size) == 3 else 1
