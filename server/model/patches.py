"""Changes to a transformers model, each with its inverse.

Only instances of a model are changed, never a class or a module of transformers: another model of the same family in
the process, such as an oracle, stays stock. ``tests/unit/test_floors.py`` keeps other files from changing a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from server.lora import module_bypass

logger = logging.getLogger("quickchange.model")


@dataclass(frozen=True)
class _Change:
    patch: str
    undo: Callable[[], object]


class ModelPatches:
    """The changes of one model, in order. A patch is all changes under one name.

    As a context manager it undoes everything at the end.
    """

    def __init__(self) -> None:
        self._changes: list[_Change] = []
        self._patch = "temporary"

    @property
    def names(self) -> list[str]:
        """The patches that are applied, in order."""
        return list(dict.fromkeys(change.patch for change in self._changes))

    def begin(self, patch: str) -> None:
        """Start a patch. An earlier one of that name is undone, together with all changes after it."""
        if patch in self.names:
            first = [change.patch for change in self._changes].index(patch)
            self._undo_from(first)
        self._patch = patch

    def undo(self) -> None:
        """Undo every change, the last one first."""
        self._undo_from(0)

    def on_undo(self, undo: Callable[[], object]) -> None:
        """Record a change that was made elsewhere, with its inverse."""
        self._changes.append(_Change(self._patch, undo))

    def replace_child(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        stock = parent._modules[name]
        assert stock is not None
        module_bypass.replace(parent, name, module)
        self.on_undo(partial(module_bypass.replace, parent, name, stock))

    def replace(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Replace the module of this name in a model."""
        parent, _, name = path.rpartition(".")
        self.replace_child(model.get_submodule(parent), name, module)

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Shadow an attribute, or a method such as ``forward``, on one instance."""
        attributes = module.__dict__
        if name in attributes:
            self.on_undo(partial(attributes.__setitem__, name, attributes[name]))
        else:
            self.on_undo(partial(attributes.pop, name, None))
        attributes[name] = value

    def _undo_from(self, first: int) -> None:
        """Undo all changes from this number on, the last one first.

        Changes whose undo fails stay, for another attempt; the first error is raised when all others are undone.
        """
        failed: list[_Change] = []
        errors: list[Exception] = []
        while len(self._changes) > first:
            change = self._changes.pop()
            try:
                change.undo()
            except Exception as error:
                logger.exception("a change of %r could not be undone", change.patch)
                failed.append(change)
                errors.append(error)
        self._changes += reversed(failed)
        if errors:
            raise errors[0]

    def __enter__(self) -> ModelPatches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def with_globals(function: FunctionType, **values: Any) -> FunctionType:
    """A copy of a function with ``values`` in place of globals of its module.

    Its code object is a copy as well: CPython caches global look-ups in it.
    """
    copy = FunctionType(
        function.__code__.replace(),
        {**function.__globals__, **values},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def bypass_modules(model: PreTrainedModel, patches: ModelPatches) -> None:
    """Call modules within the layers without ``nn.Module.__call__``."""
    patches.begin("module bypass")
    module_bypass.install(model)
    patches.on_undo(partial(module_bypass.remove, model))


_LENGTH_DEPENDENT = ("dynamic", "longrope")


def fix_rope(model: nn.Module, max_model_len: int, patches: ModelPatches) -> None:
    """Fix rotary frequencies that depend on length (dynamic, longrope) to those of ``max_model_len``.

    Stock code chooses them by the longest position in the batch: a long sequence would change a short one.
    """
    patches.begin("rotary frequencies")
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str) and _depends_on_length(rope_type):
            _choose_frequencies(module, max_model_len, patches)
            patches.set_attribute(module, "rope_type", "default")
        elif isinstance(rope_type, dict):
            dependent = [layer_type for layer_type, kind in rope_type.items() if _depends_on_length(kind)]
            for layer_type in dependent:
                _choose_frequencies(module, max_model_len, patches, layer_type=layer_type)
            patches.set_attribute(module, "rope_type", {**rope_type, **dict.fromkeys(dependent, "default")})


def _depends_on_length(rope_type: str) -> bool:
    return any(kind in rope_type for kind in _LENGTH_DEPENDENT)


def _choose_frequencies(module: nn.Module, max_model_len: int, patches: ModelPatches, **layer: str) -> None:
    """Let a rotary embedding choose its frequencies by a call for the last position; the undo restores its state."""
    attributes = dict(module.__dict__)
    buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}

    def restore() -> None:
        module.__dict__.clear()
        module.__dict__.update(attributes)
        module.__dict__["_buffers"] = buffers

    patches.on_undo(restore)
    frequencies = next(buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq"))
    last = torch.tensor([[max_model_len - 1]], device=frequencies.device)
    module(frequencies.new_zeros(1), position_ids=last, **layer)
