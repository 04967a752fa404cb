"""Layer graphs: each decoder layer is recorded once for a number of rows, and then replayed without Python."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from cpu_kernels.kernels import Kernels
from cpu_kernels.layer_graph import Arena, GraphRecorder, LayerGraph, NotRecordable, TooLarge
from server.lora.bank import LoRABank
from server.model.attention.interface import AttentionBackend, FlatAttention
from server.model.fused_ops import layers_of
from server.model.kv_cache import AttentionMetadata
from server.model.patches import ModelPatches

logger = logging.getLogger("quickchange.model")

_MOST_ROWS = 64
_ARENA_BYTES = 64 << 20
_RECORD_AT_OCCURRENCE = 2
"""The occurrence of a kind of step that is recorded; earlier ones run in Python."""

Key = tuple[int, int]
"""Number of rows, and number of threads, each of which has scratch memory."""


class GraphRunner:
    """Records and replays the layers of a model whose linears, norms and attention are native kernels.

    A step can be replayed if all of its rows are decoding and its adapters are plain low-rank deltas: everything else
    changes tensors within a layer, not only memory that kernels read. A graph must reproduce the recorded result to
    the bit, or layer graphs are disabled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: FlatAttention,
        bank: LoRABank,
        kernels: Kernels,
        patches: ModelPatches,
    ) -> None:
        assert attention.backend is not None
        self._attention, self._bank, self._kernels = attention, bank, kernels
        self._backend: AttentionBackend | None = attention.backend
        self._arena = Arena(_ARENA_BYTES)
        self._graphs: dict[Key, dict[int, LayerGraph]] = {}
        self._seen: Counter[Key] = Counter()
        self._too_large: set[Key] = set()
        self._generation = -1
        self._key: Key | None = None
        self._metadata: AttentionMetadata | None = None
        self._inputs: list[torch.Tensor] = []
        self.problem: str | None = None
        self.num_replayed = 0
        patches.on_undo(self.close)
        for number, layer in enumerate(layers_of(model)):
            patches.set_attribute(layer, "forward", self._forward(number, layer.forward))

    def close(self) -> None:
        """Free the graphs, their arena and the KV cache: nothing is recorded or replayed any more."""
        self.problem = "the base was closed, or has another runner"
        self._key = self._metadata = self._backend = None
        self._inputs = []
        self._graphs.clear()
        self._arena = Arena(0)

    def begin(self, metadata: AttentionMetadata) -> None:
        """Choose the graph of a step; called after the bank's ``begin_sorted``."""
        self._key, self._metadata, self._inputs = None, metadata, []
        if self.problem is not None or self._attention.backend is not self._backend:
            return
        if not self._bank.backend.can_replay:
            return
        num_rows = len(metadata.segments)
        if num_rows > _MOST_ROWS or any(segment.length > 1 for segment in metadata.segments):
            return
        if self._bank.generation != self._generation:
            self._generation = self._bank.generation
            self._graphs.clear()
            self._seen.clear()
        key = num_rows, torch.get_num_threads()
        if key not in self._too_large:
            self._key = key
            self._seen[key] += 1

    def _forward(self, number: int, stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **named: Any) -> Any:
            key = self._key
            if key is None or self._seen[key] < _RECORD_AT_OCCURRENCE or not self._is_current():
                return stock(*args, **named)
            inputs = [*_tensors(args), *_tensors(named.values()), *self._step_tensors()]
            graph = self._graphs.setdefault(key, {}).get(number)
            if graph is None:
                return self._recorded(key, number, lambda: stock(*args, **named), inputs)
            self.num_replayed += 1
            return graph.replay(inputs)

        return forward

    def _recorded(self, key: Key, number: int, call: Callable[[], Any], inputs: list[torch.Tensor]) -> Any:
        recorder = GraphRecorder(self._kernels.launch)
        result = recorder.record(call)
        try:
            graph = LayerGraph.of(recorder, inputs, result, self._arena)
            if not torch.equal(graph.replay(inputs).view(torch.int32), result.view(torch.int32)):
                raise NotRecordable("replay gives another result")
        except TooLarge as problem:
            self._key = None
            self._too_large.add(key)
            del self._graphs[key]
            logger.info("layer graphs disabled for %d rows: layer %d: %s", key[0], number, problem)
            return result
        except NotRecordable as problem:
            self._key, self.problem = None, f"layer {number}: {problem}"
            self._graphs.clear()
            logger.info("layer graphs disabled: %s", self.problem)
            return result
        self._graphs[key][number] = graph
        return result

    def _is_current(self) -> bool:
        """Whether the base's latest step was begun by this runner."""
        backend = self._backend
        return backend is not None and self._attention.backend is backend and backend.metadata is self._metadata

    def _step_tensors(self) -> list[torch.Tensor]:
        if not self._inputs:
            assert self._backend is not None
            self._inputs = self._backend.step_tensors()
        return self._inputs


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
