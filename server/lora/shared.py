"""Linears that receive the same tensor: one product with all their A, by the first of them that is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from server.lora.delta import Delta
from server.lora.rows import Block, Rows, Run

Part = tuple[Run | Block, torch.Tensor, torch.Tensor]
"""Rows, their product with a module's A, and its B: what ``add`` of the rows takes."""


@dataclass(frozen=True, eq=False)
class SharedA:
    """An adapter's A of several modules in one tensor: ``a`` [in, rank of all]; ``columns`` says which are whose."""

    a: torch.Tensor
    columns: Mapping[str, slice]


@dataclass(frozen=True, eq=False)
class _Product:
    """What one adapter has for an input: ``a`` [in, rank of all], and each module's columns and B."""

    a: torch.Tensor
    modules: Sequence[tuple[str, slice, torch.Tensor]]


class SharedInput:
    """The plain deltas of modules that receive the same tensor; a module that shares with none has one of its own.

    ``name`` is the first of them; ``present`` are those that are wrapped at the time.
    """

    def __init__(self, modules: tuple[str, ...], rows: Rows) -> None:
        self.name, self.modules = modules[0], modules
        self.present: set[str] = set()
        self._rows = rows
        self._products: dict[str, list[_Product]] = {}
        self._x: torch.Tensor | None = None
        self._parts: dict[str, list[Part]] = {}

    def add(self, digest: str, deltas: Mapping[str, Delta], shared: Sequence[SharedA]) -> None:
        """Take what an adapter has for these modules."""
        mine = {one: deltas[one] for one in self.modules if one in deltas and deltas[one].plain}
        products = []
        for some in shared:
            if some.columns.keys() <= mine.keys():
                products.append(_product(some, mine))
                mine = {one: delta for one, delta in mine.items() if one not in some.columns}
        for module, delta in mine.items():
            assert delta.a is not None
            products.append(_product(SharedA(delta.a, {module: slice(0, delta.a.shape[1])}), mine))
        if products:
            self._products[digest] = products

    def remove(self, digest: str) -> None:
        """Forget an adapter; one that is not there is no error."""
        self._products.pop(digest, None)

    def take(self, module: str, x: torch.Tensor) -> list[Part]:
        """What to add to a module's result for x [..., rows, in].

        x is held until every module took its part; one that comes again has it computed again.
        """
        if x is not self._x or module not in self._parts:
            self._x, self._parts = x, self._compute(x)
        part = self._parts.pop(module)
        if not self._parts:
            self._x = None
        return part

    def forget(self) -> None:
        """Let go of what a step left, whose modules were not all called."""
        self._x, self._parts = None, {}

    def _compute(self, x: torch.Tensor) -> dict[str, list[Part]]:
        parts: dict[str, list[Part]] = {module: [] for module in self.present}
        flat = x.reshape(-1, x.shape[-1])
        layout = self._rows.of(len(flat))
        for block in layout.blocks:
            self._stacked(block, flat, parts)
        for run in layout.alone:
            for use in run.uses:
                for product in self._products.get(use.digest, ()):
                    low = run.cut(flat).float() @ product.a  # [rows, rank of all]
                    if use.scale != 1.0:
                        low *= use.scale
                    for module, columns, b in product.modules:
                        parts[module].append((run, low[:, columns], b))
        return parts

    def _stacked(self, block: Block, flat: torch.Tensor, parts: dict[str, list[Part]]) -> None:
        stack = block.stack
        if self.name not in stack.low:
            return
        low = torch.bmm(block.cut(flat).float(), stack.low[self.name])  # [seats, most, rank of all]
        if block.scales is not None:
            low *= block.scales
        for module in stack.inputs[self.name]:
            parts[module].append((block, low[:, :, stack.columns[module]], stack.high[module]))


def _product(shared: SharedA, deltas: Mapping[str, Delta]) -> _Product:
    modules = []
    for module, columns in shared.columns.items():
        b = deltas[module].b
        assert b is not None
        modules.append((module, columns, b))
    return _Product(shared.a, modules)
