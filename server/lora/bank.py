"""All adapters in memory, and which rows of the current batch use which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from torch import nn

from server.lora.layer import LoRALinear, Run
from server.lora.weights import LoRAWeights
from server.sequence import Batch


class LoRABank:
    """Puts adapters onto a base model's linears; the engine thread owns it.

    A linear is wrapped when the first adapter that touches it comes, and unwrapped when the last one goes, so that a
    base without adapters pays nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[str, LoRALinear] = {}
        self._digests: set[str] = set()
        self._runs: Sequence[Run] = ()
        self._sampled_runs: Sequence[Run] = ()
        self._num_rows = self._num_sampled = 0

    def add(self, digest: str, weights: LoRAWeights) -> None:
        """Make an adapter usable; one that is there already is no error."""
        if digest in self._digests:
            return
        for module, delta in weights.deltas.items():
            if module not in self._layers:
                self._layers[module] = LoRALinear(self._model.get_submodule(module), self._runs_of)
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
        missing = {segment.sequence.adapter for segment in batch.segments} - self._digests - {None}
        assert not missing, f"sequences run on adapters that are not in memory: {missing}"
        self._num_rows, self._num_sampled = batch.num_rows, len(batch.sampling)
        self._runs = _runs((segment.sequence.adapter, segment.length) for segment in batch.segments)
        self._sampled_runs = _runs((sequence.adapter, 1) for sequence in batch.sampling)

    def _runs_of(self, num_rows: int) -> Sequence[Run]:
        """The runs over all rows; the head sees only the rows that are sampled."""
        if num_rows == self._num_rows:
            return self._runs
        assert num_rows == self._num_sampled, f"a linear got {num_rows} rows of a batch of {self._num_rows}"
        return self._sampled_runs

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(parent), attribute, module)


def _runs(lengths: Iterable[tuple[str | None, int]]) -> Sequence[Run]:
    runs: list[Run] = []
    start = 0
    for digest, group in groupby(lengths, key=lambda one: one[0]):
        end = start + sum(length for _, length in group)
        if digest is not None:
            runs.append((start, end, digest))
        start = end
    return runs
