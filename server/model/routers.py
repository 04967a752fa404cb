"""Routers of quantized mixtures of experts, which stay in floats and compute every row by a product of its own.

A matrix product adds up in an order that depends on the number of rows. The last bit of a router's result decides which
experts compute a row, so that a row would depend on the rows beside it.
"""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from server.model.patches import ModelPatches, with_globals
from server.module_proxy import ModuleProxy


def router_linears(model: PreTrainedModel, mixtures: dict[str, nn.Module]) -> set[nn.Module]:
    """Linears beside the experts that have one output for each of them."""
    found: set[nn.Module] = set()
    for name, experts in mixtures.items():
        for module in _block_of(model, name).modules():
            if type(module) is nn.Linear and module.out_features == experts.num_experts:
                found.add(module)
    return found


def compute_routers_by_row(model: PreTrainedModel, mixtures: dict[str, nn.Module], patches: ModelPatches) -> None:
    """Replace the linears and routers beside quantized experts that stayed in floats."""
    for name in mixtures:
        block_name = name.rpartition(".")[0]
        for inner, module in list(_block_of(model, name).named_modules()):
            by_row = RowByRow.like(module)
            if by_row is not None:
                patches.replace(model, f"{block_name}.{inner}", by_row)


def _block_of(model: PreTrainedModel, experts: str) -> nn.Module:
    """The module that calls router and experts."""
    return model.get_submodule(experts.rpartition(".")[0])


class RowByRow(ModuleProxy):
    """A linear or router whose ``F.linear`` computes row by row; parameters and buffers are the stock module's."""

    def __init__(self, stock: nn.Module, function: FunctionType) -> None:
        super().__init__(stock)
        self._parameters, self._buffers, self._modules = stock._parameters, stock._buffers, stock._modules
        self._function = function

    @classmethod
    def like(cls, stock: nn.Module) -> RowByRow | None:
        """None for a module without a weight of its own, or without a call of ``F.linear``."""
        function = type(stock).forward
        if stock._parameters.get("weight") is None or not isinstance(function, FunctionType):
            return None
        if "linear" not in function.__code__.co_names or function.__globals__.get("F") is not F:
            return None
        return cls(stock, with_globals(function, F=_FUNCTIONAL))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the stock module."""
        return self._function(self, *inputs, **named)


def linear_by_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear``, x [..., in] -> [..., out]. Every product reads and writes the same memory, alignment included."""
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(rows), len(weight))
    row_x, row_y = x.new_empty(x.shape[-1]), x.new_empty(len(weight))
    for row, result in zip(rows, y, strict=True):
        row_x.copy_(row)
        result.copy_(torch.mv(weight, row_x, out=row_y))
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))


_FUNCTIONAL = SimpleNamespace(**{**vars(F), "linear": linear_by_row})
