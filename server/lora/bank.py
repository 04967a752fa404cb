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
from server.lora.layer import AdaptedModule, LoRAEmbedding, LoRALinear, OwnParametersModule
from server.lora.weights import LoRAWeights, num_held_bytes
from server.sequence import Batch


class LoRABank:
    """Applies adapters to the modules of a base model; the engine thread owns it.

    A module is wrapped when the first adapter that changes it is added, and unwrapped when the last one is removed, so
    that a base without adapters has no overhead. ``base_modules`` are the base's own modules: they are never changed,
    and any thread may read them. The ``backend`` adds the plain deltas of linears. Adapters' weights and the backend's
    copies take at most ``max_bytes``.
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
    def generation(self) -> int:
        """Changes when modules are wrapped or unwrapped, or memory that kernels read moves."""
        return self._num_replaced + self.backend.generation

    def prepare(self, manifest: Manifest) -> LoRAWeights:
        """An adapter's tensors, for ``add``; any thread may call this, while steps run.

        Raises ``AdapterRejected`` if they would change nothing.
        """
        return self.backend.pack(LoRAWeights.of(manifest, self.base_modules))

    def add(self, digest: str, weights: LoRAWeights) -> int:
        """Make an adapter usable; returns its bytes. One that was added before is no error.

        After a failure nothing of the adapter is left. After ``close`` it raises ``IntegrityError``.
        """
        ensure(not self._is_closed, "no adapter can be added: the base was closed, or has a new runner")
        self._finish_removals()
        if digest in self._digests:
            return self._bytes[digest]
        try:
            self._bytes[digest] = self._install(digest, self.backend.pack(weights))
            self._limit_copies()
            self._digests.add(digest)
            return self._bytes[digest]
        except BaseException:
            self.remove(digest)
            raise

    def remove(self, digest: str) -> None:
        """Free an adapter, even a partly added one; an unknown one is no error.

        After a failure the adapter cannot be used any more, and the next ``add`` or ``remove`` finishes the removal.
        """
        self._digests.discard(digest)
        self._leaving.add(digest)
        self._finish_removals()

    @torch.inference_mode()
    def begin_sorted(self, batch: Batch) -> Batch:
        """Begin a step with the batch's segments sorted into the backend's order; returns that batch."""
        used = {use.digest for segment in batch.segments for use in segment.sequence.adapters}
        ensure(used <= self._digests, f"sequences run on adapters that are not in memory: {used - self._digests}")
        return self.backend.begin_sorted(batch)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if adapters, wrapped modules and backend disagree."""
        ensure(self._bytes.keys() == self._digests, "counted bytes and adapters differ")
        changing = {digest for layer in self._layers.values() for digest in layer.deltas}
        ensure(changing == self._digests, "modules are changed by other adapters than there are")
        ensure(all(layer.deltas for layer in self._layers.values()), "a wrapped module has no delta")
        linears = {module for module, layer in self._layers.items() if isinstance(layer, LoRALinear)}
        self.backend.check_integrity(self._digests, linears)

    def _install(self, digest: str, weights: LoRAWeights) -> int:
        for module, delta in weights.deltas.items():
            if module not in self._layers:
                self._wrap(module, delta.kind)
            self._layers[module].put(digest, delta)
        tensors = [tensor for delta in weights.deltas.values() for tensor in delta.tensors()]
        return num_held_bytes([*tensors, *self.backend.add(digest, weights)])

    def _limit_copies(self) -> None:
        """Give copies the memory that the weights do not take."""
        self.backend.limit(None if self._max_bytes is None else self._max_bytes - self.num_bytes)

    def _finish_removals(self) -> None:
        for digest in tuple(self._leaving):
            self._uninstall(digest)
            self._leaving.discard(digest)

    def _uninstall(self, digest: str) -> None:
        """Idempotent: it may be repeated after a failed addition or removal."""
        self.backend.remove(digest)
        for module, layer in list(self._layers.items()):
            layer.drop(digest)
            if not layer.deltas:
                self._unwrap(module)
        self._bytes.pop(digest, None)
        self._limit_copies()

    def _wrap(self, name: str, kind: Kind) -> None:
        """Replace a module of the base. Once it is in ``_layers``, ``remove`` undoes this."""
        base, backend = self.base_modules[name], self.backend
        if kind == "linear":
            self._layers[name] = linear = LoRALinear(base, backend, name)
            linear.attach()
        elif kind == "embedding":
            self._layers[name] = LoRAEmbedding(base, backend)
        else:
            self._layers[name] = OwnParametersModule(base, backend)
        self._replace(name, self._layers[name])

    def _unwrap(self, name: str) -> None:
        """Restore the base's module before its entry is deleted."""
        self._replace(name, self.base_modules[name])
        self.backend.detach(name)
        del self._layers[name]

    def close(self) -> None:
        """Remove all adapters and restore every module of the base; no adapter can be added any more."""
        self._is_closed = True
        self._leaving |= self._digests
        self._digests.clear()
        self._finish_removals()

    def _replace(self, name: str, module: nn.Module) -> None:
        self._num_replaced += 1
        parent, _, attribute = name.rpartition(".")
        module_bypass.replace(self.base_modules[parent], attribute, module)
