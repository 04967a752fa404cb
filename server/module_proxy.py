"""Modules in the place of other modules, and copies of modules with other parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class ModuleProxy(nn.Module):
    """Stands in the place of a stock module: modelling code finds the attributes that it lacks on the stock module."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self._stock = (stock,)  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        if name == "_stock" or name.startswith("__"):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stock[0], name)


def with_parameters(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the module with other parameters; everything else is shared.

    A ``forward`` that a patch gave the module is not copied: it computes with the module's own parameters.
    """
    other = copy.copy(module)
    other.__dict__.pop("forward", None)
    own = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    other.__dict__["_parameters"] = {**module._parameters, **own}
    return other
