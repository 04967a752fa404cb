"""All adapters in memory, on the modules they change."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from server.adapters.content.signature import Kind
from server.lora.layer import AdaptedModule, LoRAEmbedding, LoRALinear, LoRARows
from server.lora.rows import Rows
from server.lora.weights import LoRAWeights
from server.sequence import Batch

_WRAPPERS: Mapping[Kind, type[AdaptedModule]] = {
    "linear": LoRALinear,
    "embedding": LoRAEmbedding,
    "rows": LoRARows,
}


class LoRABank:
    """Puts adapters onto a base model's modules; the engine thread owns it.

    A module is wrapped when the first adapter that touches it comes, and unwrapped when the last one goes, so that a
    base without adapters pays nothing. ``base_modules`` are the base's own, wrapped or not: they are never changed, and
    any thread may read them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.base_modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._model = model
        self._layers: dict[str, AdaptedModule] = {}
        self._digests: set[str] = set()
        self._rows = Rows()

    def add(self, digest: str, weights: LoRAWeights) -> None:
        """Make an adapter usable; one that is there already is no error."""
        if digest in self._digests:
            return
        for module, delta in weights.deltas.items():
            if module not in self._layers:
                self._layers[module] = _WRAPPERS[delta.kind](self.base_modules[module], self._rows)
                self._replace(module, self._layers[module])
            self._layers[module].deltas[digest] = delta
        self._digests.add(digest)

    def remove(self, digest: str) -> None:
        """Free an adapter; one that is not there is no error."""
        self._digests.discard(digest)
        for module, layer in list(self._layers.items()):
            layer.deltas.pop(digest, None)
            if not layer.deltas:
                self._replace(module, layer.base)
                del self._layers[module]

    def begin(self, batch: Batch) -> None:
        """Note the rows of each adapter for the forward pass that follows."""
        used = {use.digest for segment in batch.segments for use in segment.sequence.adapters}
        assert used <= self._digests, f"sequences run on adapters that are not in memory: {used - self._digests}"
        self._rows.begin(batch)

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(parent), attribute, module)
