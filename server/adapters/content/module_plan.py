"""An adapter's change of one module: which tensors of the weights file form which delta, with what scaling."""

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
    """A delta ``scaling * B @ A`` as PEFT stores it: A [rank, in], B [out, rank]; experts are concatenated.

    ``swapped``: the weight is stored [in, out], so B's rows are the module's inputs.
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

    ``parameters`` are low-rank deltas of parameters outside linear layers, such as those of experts.
    """

    shape: ModuleShape
    low_rank: LowRank | None = None
    magnitude: TensorEntry | None = None
    lora_bias: TensorEntry | None = None
    own: Mapping[str, TensorEntry] = field(default_factory=dict)
    tokens: TokenRows | None = None
    parameters: Mapping[str, LowRank] = field(default_factory=dict)

    @property
    def low_ranks(self) -> list[LowRank]:
        """Every low-rank delta: the module's, then those of its parameters."""
        own = [] if self.low_rank is None else [self.low_rank]
        return [*own, *self.parameters.values()]

    @property
    def composable(self) -> bool:
        """Whether the change is a low-rank delta and nothing else."""
        has_others = self.own or self.parameters or self.tokens is not None
        return not has_others and self.magnitude is None and self.lora_bias is None

    @property
    def replaced(self) -> Mapping[str, TensorEntry]:
        """Parameters replaced whole: all of its own, except a linear's bias alone, which only shifts the output."""
        return {} if self.shape.kind == "linear" and "weight" not in self.own else self.own

    @property
    def shifted(self) -> bool:
        """Whether a vector is added to a linear's output: a trained bias, B's, or one that DoRA does not scale."""
        if self.shape.kind != "linear":
            return False
        trained_bias = "bias" in self.own and not self.replaced
        unscaled_bias = "bias" in self.shape.parameters and self.magnitude is not None
        return trained_bias or self.lora_bias is not None or unscaled_bias

    def tensor_bytes(self) -> Iterator[tuple[str, int]]:
        """Name and bytes in memory of each tensor. Modules that share a tensor yield the same name."""
        for delta in self.low_ranks:
            itemsize = 4 if delta is self.low_rank else self.shape.itemsize
            yield delta.a.name, itemsize * math.prod(delta.a.shape)
            yield delta.b.name, itemsize * math.prod(delta.b.shape)
        for name, entry in self.replaced.items():
            yield entry.name, self.shape.num_bytes(name)
        if self.tokens is not None:
            yield self.tokens.rows.name, 4 * math.prod(self.tokens.rows.shape) + 8 * len(self.tokens.indices)

    @property
    def vector_bytes(self) -> int:
        """Bytes in memory of DoRA's scale and of the shift."""
        num_vectors = int(self.magnitude is not None) + int(self.shifted)
        return 4 * self.shape.size[1] * num_vectors


def module_plan(module: str, tensors: ModuleTensors, config: LoRAConfig, shape: ModuleShape) -> ModulePlan:
    """The plan; its shapes are not checked yet. Raises ``ValueError`` if tensors are missing or superfluous."""
    targets = target_parameters_of(module, config, shape) if tensors.levels else []
    low_rank = None if targets else _low_rank(module, tensors, config, shape)
    parameters = _parameters(module, tensors, targets, config, shape)
    if shape.kind != "rows" and parameters:
        low_rank = next(iter(parameters.values()))
        parameters = {}
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
        raise ValueError(
            f"{module} has tensors of an embedding, and is none in the base: was the adapter trained on another base?"
        )
    if tensors.levels and shape.kind != "linear":
        raise ValueError(
            f"{module} has a delta, but is no linear layer in the base, and target_parameters in adapter_config.json "
            "names no parameter of it"
        )
    if tensors.levels and set(tensors.levels) != {0}:
        raise ValueError(f"{module} has nested deltas, and target_parameters in adapter_config.json does not name them")
    a, b = _pair(module, tensors.levels[0] if tensors.levels else tensors.embedding)
    return LowRank(a, b, a.shape[0] if a.shape else 0, config.scaling(module))


def _parameters(
    module: str, tensors: ModuleTensors, targets: list[str], config: LoRAConfig, shape: ModuleShape
) -> dict[str, LowRank]:
    """PEFT nests one wrapper per parameter, the first innermost; the outermost has no ``base_layer`` in its names."""
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


def _pair(name: str, tensors: Mapping[str, TensorEntry]) -> tuple[TensorEntry, TensorEntry]:
    for letter in "AB":
        if letter not in tensors:
            raise ValueError(f"{name} has no tensor {letter} of its delta: A or B is missing")
    return tensors["A"], tensors["B"]


def num_experts(shape: ModuleShape, parameter: str) -> int:
    size = shape.parameters[parameter]
    return size[0] if len(size) == 3 else 1
