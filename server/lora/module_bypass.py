"""Calls child modules without ``nn.Module``'s overhead.

``nn.Module`` finds a child in ``__getattr__`` and calls it through four Python frames: a tenth of a step of one row. A
bypass is the child's ``forward`` in the parent's ``__dict__``, where Python looks first. It calls no forward hooks. The
parent's ``_modules`` are not changed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class ModuleBypass(partial[Any]):
    """A child's ``forward`` as its parent calls it. Every other attribute is the child's."""

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


def install(model: nn.Module) -> None:
    """Bypass every module within the layers of a model; children of the model itself are also read in other ways."""
    for parent in model.modules():
        if not isinstance(parent, PreTrainedModel):
            for attribute, child in parent._modules.items():
                if child is not None and _can_bypass(child):
                    parent.__dict__[attribute] = _bypass(child)


def remove(model: nn.Module) -> None:
    """Remove every bypass, so that hooks are called."""
    for parent in model.modules():
        for attribute in parent._modules:
            parent.__dict__.pop(attribute, None)


def replace(parent: nn.Module, attribute: str, module: nn.Module) -> None:
    """Replace a child, and its bypass where it has one."""
    has_bypass = attribute in parent.__dict__
    setattr(parent, attribute, module)  # removes the bypass
    if has_bypass:
        parent.__dict__[attribute] = _bypass(module)


def _bypass(module: nn.Module) -> ModuleBypass:
    bypass = ModuleBypass(module.forward)
    bypass.__dict__["module"] = module
    return bypass


def _can_bypass(module: nn.Module) -> bool:
    """Whether a call is nothing but ``forward``, and nothing iterates over the module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    iterable = hasattr(type(module), "__getitem__") or hasattr(type(module), "__iter__")
    return type(module).__call__ is nn.Module.__call__ and not any(hooks) and not iterable
