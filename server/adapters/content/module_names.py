"""Modules of the base by the names that they have in other models that hold it: compiled, parallel, multimodal.

A training run may put the model into wrappers whose names end up in the tensors' names. The module is the same where
the name without them is that of exactly one module of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "base_model.model."
_HOOKS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_fpw_module)(?:\.|$)"
)
"""``torch.compile``, FSDP, activation checkpointing, Fabric and FairScale: names that no model gives to its modules."""

_HOLDERS = frozenset({
    "base_model", "model", "module", "pretrained_model", "transformer", "gpt_neox",
    "language_model", "text_model", "llm", "thinker",
})  # fmt: skip
"""Modules that hold a whole language model: PEFT's and transformers' own, DDP's, TRL's, those of multimodal models."""


def without_hooks(name: str) -> str:
    """A tensor's or module's name without the wrappers that torch puts around modules while they are trained."""
    return _HOOKS.sub("", name).removesuffix(".")


_MOST_HOLDERS = 12
"""Holders that may stand in a module's name beside those of its own name."""


class ModuleNames:
    """The base's modules, found by their own names or by those that they have inside of wrappers."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._own = frozenset(modules)
        self._most_parts = max((name.count(".") + 1 for name in self._own), default=0) + _MOST_HOLDERS
        self._by_tail: dict[str, str | None] = {}
        for name in self._own:
            tail = _tail(name)
            self._by_tail[tail] = None if tail in self._by_tail else name  # None: of two, so nobody's

    def find(self, name: str) -> str | None:
        """The base's name of a module; None where it has none, or two that it might be."""
        return name if name in self._own else self._by_tail.get(_tail(name))

    def unknown_wrapper(self, name: str) -> str | None:
        """What stands before a name of the base's, where that alone keeps the module from being found."""
        parts = name.split(".")
        starts = range(max(1, len(parts) - self._most_parts), len(parts))
        return next((".".join(parts[:start]) for start in starts if self.find(".".join(parts[start:]))), None)


def trained_name(name: str) -> str:
    """A module's name in the model that PEFT was given, which the patterns of its config are about."""
    return name.rpartition(PREFIX)[2].removeprefix("module.")


def _tail(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _HOLDERS)
