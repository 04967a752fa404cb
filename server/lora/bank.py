"""All adapters in memory, on the modules they change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from server.adapters.content.manifest import Manifest
from server.adapters.content.signature import Kind
from server.integrity import ensure
from server.lora import module_bypass
from server.lora.backend import LoRABackend
from server.lora.layer import AdaptedModule, LoRAEmbedding, LoRALinear, LoRARows
from server.lora.weights import LoRAWeights, num_held_bytes
from server.sequence import Batch


class LoRABank:
    """Puts adapters onto a base model's modules; the engine thread owns it.

    A module is wrapped when the first adapter that touches it comes, and unwrapped when the last one goes, so that a
    base without adapters pays nothing. ``base_modules`` are the base's own, wrapped or not: they are never changed, and
    any thread may read them. The ``backend`` adds the plain deltas of linears. Adapters' weights and its copies of them
    take ``max_bytes`` at most.
    """

    def __init__(self, model: nn.Module, backend: LoRABackend, *, max_bytes: int | None = None) -> None:
        self.base_modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.backend = backend
        self._layers: dict[str, AdaptedModule] = {}
        self._digests: set[str] = set()
        self._leaving: set[str] = set()
        self._bytes: dict[str, int] = {}
        self._max_bytes = max_bytes
        self._num_replaced = 0
        self._is_closed = False
        backend.limit(max_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters' weights."""
        return sum(self._bytes.values())

    @property
    def can_replay(self) -> bool:
        """Whether layer graphs may be replayed in the step at hand, for all that adapters change."""
        return self.backend.can_replay

    @property
    def generation(self) -> int:
        """Another number when modules were wrapped or unwrapped, or what kernels read lies elsewhere."""
        return self._num_replaced + self.backend.generation

    def prepare(self, manifest: Manifest) -> LoRAWeights:
        """An adapter's tensors, for ``add``; any thread may call this, while steps run.

        Raises ``AdapterRejected`` where they would change nothing.
        """
        return self.backend.pack(LoRAWeights.of(manifest, self.base_modules))

    def add(self, digest: str, weights: LoRAWeights) -> int:
        """Make an adapter usable; the bytes that it takes. One that is there already is no error.

        Where it fails, nothing of it is left. After ``close`` it raises ``IntegrityError``.
        """
        ensure(not self._is_closed, "no adapter can be added: the base was closed, or has a new runner")
        self._finish_removals()
        if digest in self._digests:
            return self._bytes[digest]
        try:
            self._bytes[digest] = self._put_in(digest, self.backend.pack(weights))
            self._limit_copies()
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

    @torch.inference_mode()
    def begin(self, batch: Batch) -> Batch:
        """Prepare a step; the batch in the order in which its rows are to be computed."""
        used = {use.digest for segment in batch.segments for use in segment.sequence.adapters}
        ensure(used <= self._digests, f"sequences run on adapters that are not in memory: {used - self._digests}")
        return self.backend.begin(batch)

    def check_integrity(self) -> None:
        """The books of adapters, and of what is wrapped."""
        ensure(self._bytes.keys() == self._digests, "an adapter's bytes are not counted, or those of none")
        changing = {digest for layer in self._layers.values() for digest in layer.deltas}
        ensure(changing == self._digests, "modules are changed by other adapters than there are")
        ensure(all(layer.deltas for layer in self._layers.values()), "a module is wrapped for nobody")
        linears = {module for module, layer in self._layers.items() if isinstance(layer, LoRALinear)}
        self.backend.check_integrity(self._digests, linears)

    def _put_in(self, digest: str, weights: LoRAWeights) -> int:
        for module, delta in weights.deltas.items():
            if module not in self._layers:
                self._wrap(module, delta.kind)
            self._layers[module].put(digest, delta)
        own = [tensor for delta in weights.deltas.values() for tensor in delta.tensors()]
        return num_held_bytes([*own, *self.backend.add(digest, weights)])

    def _limit_copies(self) -> None:
        """Leave to copies what the weights do not need."""
        self.backend.limit(None if self._max_bytes is None else self._max_bytes - self.num_bytes)

    def _finish_removals(self) -> None:
        for digest in tuple(self._leaving):
            self._take_out(digest)
            self._leaving.discard(digest)

    def _take_out(self, digest: str) -> None:
        """Every step of it may be done twice, and finds what a failed addition or removal has left."""
        self.backend.remove(digest)
        for module, layer in list(self._layers.items()):
            layer.drop(digest)
            if not layer.deltas:
                self._unwrap(module)
        self._bytes.pop(digest, None)
        self._limit_copies()

    def _wrap(self, name: str, kind: Kind) -> None:
        """Put a module of ours in the place of the base's. From its entry in the books on, ``remove`` undoes it."""
        base, backend = self.base_modules[name], self.backend
        if kind == "linear":
            self._layers[name] = linear = LoRALinear(base, backend, name)
            linear.attach()
        elif kind == "embedding":
            self._layers[name] = LoRAEmbedding(base, backend)
        else:
            self._layers[name] = LoRARows(base, backend)
        self._replace(name, self._layers[name])

    def _unwrap(self, name: str) -> None:
        """Put the base's module back, and only then forget that it was gone."""
        self._replace(name, self.base_modules[name])
        self.backend.detach(name)
        del self._layers[name]

    def close(self) -> None:
        """Remove all adapters, so that every module of the base is back; none can be added any more."""
        self._is_closed = True
        self._leaving |= self._digests
        self._digests.clear()
        self._finish_removals()

    def _replace(self, name: str, module: nn.Module) -> None:
        self._num_replaced += 1
        parent, _, attribute = name.rpartition(".")
        module_bypass.replace(self.base_modules[parent], attribute, module)
