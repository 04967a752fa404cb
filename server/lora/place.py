"""Puts modules in the place of others, where their parents find and call them fast.

``nn.Module`` finds a child by a search and calls it through four frames of Python, which at one row is a tenth of a
step. A shortcut is what the parent finds instead, as a plain attribute. Parents' books (``_modules``) stay as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class Shortcut(partial[Any]):
    """A module's ``forward`` as its parent calls it. Whatever else is read of it is the module's."""

    def __getattr__(self, name: str) -> Any:
        """The module's attribute."""
        if name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


def put(parent: nn.Module, attribute: str, module: nn.Module) -> None:
    """Make a module a child, by a shortcut if the one before had one."""
    shortcut = _shortcut(module) if attribute in parent.__dict__ else None
    setattr(parent, attribute, module)  # which drops the shortcut before
    if shortcut is not None:
        parent.__dict__[attribute] = shortcut


def shorten(model: nn.Module) -> None:
    """Shortcuts within the layers of a model; the whole model's own children are read in other ways, too."""
    for parent in model.modules():
        if not isinstance(parent, PreTrainedModel | Shortcut):
            for attribute, child in parent._modules.items():
                if child is not None and _is_plain(child):
                    parent.__dict__[attribute] = _shortcut(child)


def lengthen(model: nn.Module) -> None:
    """Take all shortcuts away, so that hooks are called."""
    for parent in model.modules():
        for attribute in parent._modules:
            parent.__dict__.pop(attribute, None)


def _shortcut(module: nn.Module) -> Shortcut:
    shortcut = Shortcut(module.forward)
    shortcut.__dict__["module"] = module
    return shortcut


def _is_plain(module: nn.Module) -> bool:
    """Whether calling it is its ``forward`` and nothing else, and nobody takes it for a list."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    listed = hasattr(type(module), "__getitem__") or hasattr(type(module), "__iter__")
    return type(module).__call__ is nn.Module.__call__ and not any(hooks) and not listed
