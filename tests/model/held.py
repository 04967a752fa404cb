"""What a LoRA bank really keeps in memory: every tensor that can be reached from it, whatever it counts itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from server.lora.backend import BatchAdapters
from server.lora.bank import LoRABank
from server.lora.batched import BatchedTorchLoRA, SharedLoRAInput
from server.lora.layer import AdaptedModule
from server.lora.native import NativeLoRA

OF_A_STEP = {
    BatchedTorchLoRA: {"_layouts"},
    SharedLoRAInput: {"_x", "_terms"},
    NativeLoRA: {"_cells", "_task_tables", "_low"},
}
"""What a step works on, and what is there without any adapter."""


def held_bytes(bank: LoRABank) -> int:
    """Bytes behind all tensors that the bank keeps, the base's own and what a step works on left out."""
    modules = bank.base_modules.values()
    base = {id(parameter) for module in modules for parameter in module._parameters.values()}
    found = [tensor for tensor in _tensors(bank, {id(module) for module in modules}) if id(tensor) not in base]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif id(thing) not in seen:
        seen.add(id(thing))
        for part in _parts(thing):
            yield from _tensors(part, seen)


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    if isinstance(thing, BatchAdapters):
        return []
    if is_dataclass(thing) and not isinstance(thing, type):
        return [getattr(thing, field.name) for field in fields(thing)]
    if isinstance(thing, nn.Module) and not isinstance(thing, AdaptedModule):
        return list(thing._parameters.values())  # a module of the base with other parameters: all else is the base's
    if not type(thing).__module__.startswith("server.lora"):
        return []
    return [part for name, part in vars(thing).items() if name not in OF_A_STEP.get(type(thing), ())]
