"""All adapters in memory, on the modules they change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from cpu_kernels.kernels import Kernels
from cpu_kernels.linear import Deltas
from server.adapters.content.signature import Kind
from server.integrity import ensure
from server.lora import module_bypass
from server.lora.layer import AdaptedModule, LoRAEmbedding, LoRALinear, LoRARows
from server.lora.rows import Rows, Seating
from server.lora.shared import SharedInput
from server.lora.stack import Shape, Stack, shape_of
from server.lora.weights import LoRAWeights, num_held_bytes
from server.sequence import Batch, Segment

if TYPE_CHECKING:
    from server.lora.compiled import CompiledDeltas

logger = logging.getLogger("quickchange.lora")

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
    many are computed side by side. Where ``kernels`` have a native kernel for deltas it adds them;
    ``products`` are those that add deltas themselves, each with its linears.

    Adapters that are computed side by side are copied for it. Together with the weights the copies take ``max_bytes``
    at most: where there is no memory for them, adapters are computed one after another.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[tuple[str, ...]] = (),
        *,
        max_seats: int,
        kernels: Kernels,
        products: Sequence[tuple[Product, Parts]] = (),
        max_bytes: int | None = None,
    ) -> None:
        self.base_modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.groups = groups
        self._model, self._max_seats = model, max_seats
        self._device = next(model.parameters()).device
        self._layers: dict[str, AdaptedModule] = {}
        self._digests: set[str] = set()
        self._leaving: set[str] = set()
        self._bytes: dict[str, int] = {}
        self._max_bytes = max_bytes
        self._rows = Rows()
        self._inputs = {
            module: shared for modules in groups for shared in (self._input(modules),) for module in modules
        }
        self._stacks: dict[Shape, Stack] = {}
        self._stack_of: dict[str, Stack] = {}
        self._without_copies: set[Stack] = set()
        self._arranged: tuple[Batch, Sequence[Seating]] | None = None
        self._used: set[str] = set()
        self._unsteady: set[str] = set()
        self._num_replaced = 0
        self.compiled: CompiledDeltas | None = None
        if kernels.add_deltas is not None:
            from server.lora.compiled import CompiledDeltas

            self.compiled = CompiledDeltas(list(self.base_modules), self._rows, kernels, max_seqs=max_seats)
        self.tiled = {name: one for one in products if self.compiled is not None for name, _ in one[1]}

    @property
    def copies(self) -> bool:
        """Whether adapters are copied to be computed side by side; a routine takes them as they are."""
        return self.compiled is None

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters' weights."""
        return sum(self._bytes.values())

    @property
    def num_stacked_bytes(self) -> int:
        """Bytes of the copies that lie side by side."""
        return sum(stack.num_bytes for stack in self._stacks.values())

    def add(self, digest: str, weights: LoRAWeights) -> int:
        """Make an adapter usable; the bytes that it takes. One that is there already is no error.

        Where it fails, nothing of it is left.
        """
        self._finish_removals()
        if digest in self._digests:
            return self._bytes[digest]
        try:
            self._bytes[digest] = self._put_in(digest, weights)
            self._make_room()
            self._digests.add(digest)
            return self._bytes[digest]
        except BaseException:
            self.remove(digest)
            raise

    def remove(self, digest: str) -> None:
        """Free an adapter, also one that was half added; one that is not there is no error.

        Where it fails, the adapter cannot be used any more, and the next ``add`` or ``remove`` frees what is left.
        """
        self._digests.discard(digest)
        self._leaving.add(digest)
        self._finish_removals()

    def _put_in(self, digest: str, weights: LoRAWeights) -> int:
        deltas = {name: delta.in_tiles() if name in self.tiled else delta for name, delta in weights.deltas.items()}
        for module, delta in deltas.items():
            if module not in self._layers:
                self._wrap(module, delta.kind)
            self._layers[module].put(digest, delta)
        tensors = [tensor for delta in deltas.values() for tensor in delta.tensors()]
        if self.compiled is not None:
            self.compiled.add(digest, deltas)
            if any(not delta.plain or delta.kind == "rows" for delta in deltas.values()):
                self._unsteady.add(digest)
            return num_held_bytes([*tensors, *self.compiled.kept(digest)])
        self._put_side_by_side(digest, weights)
        return num_held_bytes(tensors)

    def _put_side_by_side(self, digest: str, weights: LoRAWeights) -> None:
        """Note what is computed together: by modules that receive the same tensor, by adapters of the same shape."""
        for shared in {id(one): one for module in weights.deltas if (one := self._inputs.get(module))}.values():
            shared.add(digest, weights.deltas, weights.shared)
        if (shape := shape_of(weights.deltas)) is not None:
            stack = self._stacks.setdefault(shape, Stack(self._by_input(shape), shape, max_seats=self._max_seats))
            stack.adapters[digest] = weights.deltas
            self._stack_of[digest] = stack

    def _finish_removals(self) -> None:
        for digest in tuple(self._leaving):
            self._take_out(digest)
            self._leaving.discard(digest)

    def _take_out(self, digest: str) -> None:
        """Every step of it may be done twice, and finds what a failed addition or removal has left."""
        if self.compiled is not None:
            self.compiled.remove(digest)
            self._unsteady.discard(digest)
        self._stack_of.pop(digest, None)
        for shape, stack in list(self._stacks.items()):
            stack.remove(digest)
            if not stack.adapters:
                del self._stacks[shape]
        self._without_copies.clear()
        for shared in self._inputs.values():
            shared.remove(digest)
        for module, layer in list(self._layers.items()):
            layer.drop(digest)
            if not layer.deltas:
                self._unwrap(module, layer)
        self._bytes.pop(digest, None)

    @torch.inference_mode()
    def arrange(self, batch: Batch) -> Batch:
        """Rows of the base first, then those of each stack in the order of seats, then those computed run by run."""
        places: dict[str, tuple[int, int]] = {}
        seatings: list[Seating] = []
        for stack, digests in self._stacked(batch).items():
            seats = self._seats(stack, digests, [seating.stack for seating in seatings])
            if not seats:
                continue
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
        ensure(used <= self._digests, f"sequences run on adapters that are not in memory: {used - self._digests}")
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
        """The books of adapters, of seats, and of what is wrapped."""
        for stack in self._stacks.values():
            stack.check_integrity()
        stacked = {digest for stack in self._stacks.values() for digest in stack.adapters}
        ensure(stacked == self._stack_of.keys(), "an adapter is in a stack and not in its books")
        ensure(self._stack_of.keys() <= self._digests, "a stack has an adapter that is gone")
        ensure(self._bytes.keys() == self._digests, "an adapter's bytes are not counted, or those of none")
        ensure(self.compiled is None or self.compiled.digests == self._digests, "tables have other adapters")
        changing = {digest for layer in self._layers.values() for digest in layer.deltas}
        ensure(changing == self._digests, "modules are changed by other adapters than there are")
        ensure(all(layer.deltas for layer in self._layers.values()), "a module is wrapped for nobody")
        present = {module for shared in self._inputs.values() for module in shared.present}
        linears = {module for module, layer in self._layers.items() if isinstance(layer, LoRALinear)}
        ensure(present == linears, "inputs know of other linears than are wrapped")

    def _make_room(self) -> None:
        """Give copies up where weights need their memory."""
        for stack in self._stacks.values():
            if self._max_bytes is None or self.num_bytes + self.num_stacked_bytes <= self._max_bytes:
                return
            stack.clear()

    def _seats(self, stack: Stack, digests: Sequence[str], busy: Sequence[Stack]) -> Mapping[str, int]:
        """Seats in a stack for as many of these adapters as there is memory for, none for fewer than two.

        Copies that the step does not use make room; those in ``busy`` stacks are in use.
        """
        if stack in self._without_copies:
            return {}
        room = self._room(stack, len(digests), busy)
        if room < len(digests):
            digests = sorted(digests, key=lambda digest: not stack.is_seated(digest))[:room]
        if len(digests) < 2:
            return {}
        try:
            return stack.place(digests, max_seats=room)
        except (MemoryError, RuntimeError) as error:
            self._without_copies.add(stack)
            logger.warning("no memory to compute adapters side by side, so they are one by one: %s", error)
            return {}

    def _room(self, stack: Stack, num_seats: int, busy: Sequence[Stack]) -> int:
        """How many seats a stack may have."""
        if self._max_bytes is None:
            return self._max_seats
        others = [one for one in self._stacks.values() if one is not stack]
        for other in others:
            taken = self.num_bytes + sum(one.num_bytes for one in others)
            if taken + num_seats * stack.seat_bytes <= self._max_bytes:
                break
            if other not in busy:
                other.clear()
        taken = self.num_bytes + sum(one.num_bytes for one in others)
        return max(stack.capacity, (self._max_bytes - taken) // stack.seat_bytes)

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
        """Put a module of ours in the place of the base's. From its entry in the books on, ``remove`` undoes it."""
        base = self.base_modules[name]
        if kind != "linear":
            self._layers[name] = (LoRAEmbedding if kind == "embedding" else LoRARows)(base, self._rows)
        else:
            shared = self._inputs.setdefault(name, self._input((name,)))
            in_product = name in self.tiled
            layer = LoRALinear(base, self._rows, name, shared, self.compiled, in_product=in_product)
            if self.compiled is not None:
                self.compiled.table(name)
            self._layers[name] = layer
            shared.present.add(name)
            if self.compiled is not None and in_product:
                product, modules = self.tiled[name]
                product.deltas = product.deltas or self.compiled.of_product(modules)
        self._replace(name, self._layers[name])

    def _unwrap(self, name: str, layer: AdaptedModule) -> None:
        """Put the base's module back, and only then forget that it was gone."""
        self._replace(name, self.base_modules[name])
        if isinstance(layer, LoRALinear):
            self._inputs[name].present.discard(name)
        if name in self.tiled:
            product, modules = self.tiled[name]
            if not any(module in self._layers for module, _ in modules if module != name):
                product.deltas = None
        del self._layers[name]

    def _replace(self, name: str, module: nn.Module) -> None:
        self._num_replaced += 1
        parent, _, attribute = name.rpartition(".")
        module_bypass.replace(self.base_modules[parent], attribute, module)


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
