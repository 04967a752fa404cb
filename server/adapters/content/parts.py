"""From the tensors of one module to its plan: which tensor is which delta, and with what scaling."""

from __future__ import annotations

from collections.abc import Mapping

from base_files.safetensors_header import TensorEntry
from server.adapters.content.module_plan import LowRank, ModulePlan, TokenRows
from server.adapters.content.peft_config import LoRAConfig
from server.adapters.content.signature import ModuleShape
from server.adapters.content.tensor_names import ModuleTensors


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
    """How many matrices a parameter holds."""
    size = shape.parameters[parameter]
    return size[0] if len(size) == 3 else 1
