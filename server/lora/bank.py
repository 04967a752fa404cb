"""All adapters in memory, on the modules they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from server.adapters.content.signature import Kind
from server.lora.layer import AdaptedModule, LoRAEmbedding, LoRALinear, LoRARows
from server.lora.place import put
from server.lora.rows import Rows, Seating
from server.lora.shared import SharedInput
from server.lora.stack import Shape, Stack, shape_of
from server.lora.weights import LoRAWeights
from server.native.routine import Deltas
from server.sequence import Batch, Segment

if TYPE_CHECKING:
    from server.lora.compiled import CompiledDeltas

# What benchmarks/lora_bank.py measured, in rows of a stack.
_ALONE, _ROW_ALONE = 12, 0.3
"""What an adapter's calls cost more if it is computed alone, and what each of its rows does."""
_UNEVEN = 10
"""What gathering rows costs where adapters of a stack have unequally many."""


Parts = Sequence[tuple[str, int]]
"""A product's linears: name, and number of outputs."""


class Product(Protocol):
    """What computes several linears, and adds the deltas of adapters where it has any."""

    deltas: Deltas | None


class LoRABank:
    """Puts adapters onto a base model's modules; the engine thread owns it.

    A module is wrapped when the first adapter that touches it comes, and unwrapped when the last one goes, so that a
    base without adapters pays nothing. ``base_modules`` are the base's own, wrapped or not: they are never changed, and
    any thread may read them. ``groups`` are linears that receive the same tensor; ``max_seats`` bounds how
    many are computed side by side. With ``compiled`` a routine adds the deltas: float32 on a CPU that has routines;
    ``products`` are those that add deltas themselves, each with its linears.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[tuple[str, ...]] = (),
        *,
        max_seats: int,
        compiled: bool = False,
        products: Sequence[tuple[Product, Parts]] = (),
    ) -> None:
        self.base_modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.groups = groups
        self._model, self._max_seats = model, max_seats
        self._device = next(model.parameters()).device
        self._layers: dict[str, AdaptedModule] = {}
        self._digests: set[str] = set()
        self._rows = Rows()
        self._inputs = {
            module: shared for modules in groups for shared in (self._input(modules),) for module in modules
        }
        self._stacks: dict[Shape, Stack] = {}
        self._stack_of: dict[str, Stack] = {}
        self._arranged: tuple[Batch, Sequence[Seating]] | None = None
        self._used: set[str] = set()
        self._unsteady: set[str] = set()
        self._num_replaced = 0
        self.compiled: CompiledDeltas | None = None
        if compiled:
            from server.lora.compiled import CompiledDeltas

            self.compiled = CompiledDeltas(list(self.base_modules), self._rows, max_seqs=max_seats)
        self.tiled = {name: one for one in products if compiled for name, _ in one[1]}

    @property
    def num_stacked_bytes(self) -> int:
        """Bytes of the copies that lie side by side."""
        return sum(stack.num_bytes for stack in self._stacks.values())

    def add(self, digest: str, weights: LoRAWeights) -> None:
        """Make an adapter usable; one that is there already is no error."""
        if digest in self._digests:
            return
        deltas = {name: delta.in_tiles() if name in self.tiled else delta for name, delta in weights.deltas.items()}
        for module, delta in deltas.items():
            if module not in self._layers:
                self._wrap(module, delta.kind)
            self._layers[module].put(digest, delta)
        self._digests.add(digest)
        if self.compiled is not None:
            self.compiled.add(digest, deltas)
            if any(not delta.plain or delta.kind == "rows" for delta in deltas.values()):
                self._unsteady.add(digest)
            return
        for shared in {id(one): one for module in weights.deltas if (one := self._inputs.get(module))}.values():
            shared.add(digest, weights.deltas, weights.shared)
        if (shape := shape_of(weights.deltas)) is not None:
            stack = self._stacks.setdefault(shape, Stack(self._by_input(shape), shape, max_seats=self._max_seats))
            stack.adapters[digest] = weights.deltas
            self._stack_of[digest] = stack

    def remove(self, digest: str) -> None:
        """Free an adapter; one that is not there is no error."""
        self._digests.discard(digest)
        if self.compiled is not None:
            self.compiled.remove(digest)
            self._unsteady.discard(digest)
        if (stack := self._stack_of.pop(digest, None)) is not None:
            stack.remove(digest)
            self._stacks = {shape: one for shape, one in self._stacks.items() if one.adapters}
        for module, layer in list(self._layers.items()):
            layer.drop(digest)
            if isinstance(layer, LoRALinear):
                self._inputs[module].remove(digest)
            if not layer.deltas:
                self._unwrap(module, layer)

    @torch.inference_mode()
    def arrange(self, batch: Batch) -> Batch:
        """Rows of the base first, then those of each stack in the order of seats, then those computed run by run."""
        places: dict[str, tuple[int, int]] = {}
        seatings: list[Seating] = []
        for stack, digests in self._stacked(batch).items():
            seats = stack.place(digests)
            places |= {digest: (len(seatings), seat) for digest, seat in seats.items()}
            seatings.append(Seating(stack, seats, stack.num_window))
        last = (len(seatings), 0)

        def key(segment: Segment) -> tuple[bool, tuple[int, int], object]:
            uses = segment.sequence.adapters
            return bool(uses), places.get(uses[0].digest, last) if len(uses) == 1 else last, uses

        arranged = replace(batch, segments=tuple(sorted(batch.segments, key=key)))
        self._arranged = arranged, seatings
        return arranged

    def begin(self, batch: Batch) -> None:
        """Note the rows of each adapter for the forward pass that follows, of an arranged batch or another."""
        used = {use.digest for segment in batch.segments for use in segment.sequence.adapters}
        assert used <= self._digests, f"sequences run on adapters that are not in memory: {used - self._digests}"
        self._used = used
        arranged, seatings = self._arranged or (None, ())
        self._arranged = None
        if self._rows.active:  # a step that failed may have left something
            for shared in self._inputs.values():
                shared.forget()
        self._rows.begin(batch, seatings if arranged is batch else (), self._device)
        if self.compiled is not None:
            self.compiled.begin()

    @property
    def steady(self) -> bool:
        """Whether all adapters of the step at hand are tables and numbers that routines read, and nothing else."""
        return self.compiled is not None and not self._used & self._unsteady

    @property
    def generation(self) -> int:
        """Another number when modules were wrapped or unwrapped, or what routines read lies elsewhere."""
        return self._num_replaced + (0 if self.compiled is None else self.compiled.generation)

    def check_integrity(self) -> None:
        """The books of seats, and of what is wrapped."""
        for stack in self._stacks.values():
            stack.check_integrity()
        assert {digest for stack in self._stacks.values() for digest in stack.adapters} == self._stack_of.keys()
        assert self._stack_of.keys() <= self._digests
        present = {module for shared in self._inputs.values() for module in shared.present}
        assert present == {module for module, layer in self._layers.items() if isinstance(layer, LoRALinear)}

    def _stacked(self, batch: Batch) -> Mapping[Stack, Sequence[str]]:
        """The adapters that are computed side by side, where two or more have few rows."""
        rows: dict[Stack, dict[str, int]] = {}
        for segment in batch.segments:
            uses = segment.sequence.adapters
            stack = self._stack_of.get(uses[0].digest) if len(uses) == 1 else None
            if stack is not None:
                counts = rows.setdefault(stack, {})
                counts[uses[0].digest] = counts.get(uses[0].digest, 0) + segment.length
        chosen = {stack: side_by_side(counts) for stack, counts in rows.items()}
        return {stack: digests for stack, digests in chosen.items() if 0 < len(digests) <= self._max_seats}

    def _input(self, modules: tuple[str, ...]) -> SharedInput:
        return SharedInput(modules, self._rows)

    def _by_input(self, shape: Shape) -> Mapping[str, Sequence[str]]:
        inputs: dict[str, list[str]] = {}
        for module in sorted(module for module, _ in shape):
            inputs.setdefault(self._inputs[module].name, []).append(module)
        return inputs

    def _wrap(self, name: str, kind: Kind) -> None:
        base = self.base_modules[name]
        if kind == "linear":
            shared = self._inputs.setdefault(name, self._input((name,)))
            shared.present.add(name)
            if self.compiled is not None and name in self.tiled:
                product, modules = self.tiled[name]
                product.deltas = product.deltas or self.compiled.of_product(modules)
            in_product = name in self.tiled
            self._layers[name] = LoRALinear(base, self._rows, name, shared, self.compiled, in_product=in_product)
        else:
            self._layers[name] = (LoRAEmbedding if kind == "embedding" else LoRARows)(base, self._rows)
        self._replace(name, self._layers[name])

    def _unwrap(self, name: str, layer: AdaptedModule) -> None:
        if isinstance(layer, LoRALinear):
            self._inputs[name].present.discard(name)
        self._replace(name, self.base_modules[name])
        del self._layers[name]
        if name in self.tiled:
            product, modules = self.tiled[name]
            if not any(module in self._layers for module, _ in modules):
                product.deltas = None

    def _replace(self, name: str, module: nn.Module) -> None:
        self._num_replaced += 1
        parent, _, attribute = name.rpartition(".")
        put(self.base_modules[parent], attribute, module)


def side_by_side(rows: Mapping[str, int]) -> Sequence[str]:
    """Which adapters to compute stacked, each padded to the most rows among them, so that all together cost least."""
    fewest_first = sorted(rows, key=lambda digest: rows[digest])
    alone = sum(_ALONE + _ROW_ALONE * count for count in rows.values())
    best, cost = 0, alone
    for number, digest in enumerate(fewest_first, start=1):
        most = rows[digest]
        alone -= _ALONE + _ROW_ALONE * most
        stacked = number * most + (_UNEVEN if rows[fewest_first[0]] < most else 0)
        if number > 1 and alone + stacked < cost:
            best, cost = number, alone + stacked
    return fewest_first[:best]
