"""A batch through the base model in one flat forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from cpu_kernels.kernels import Kernels
from server.adapters.content.manifest import Manifest
from server.lora.bank import LoRABank
from server.lora.transfer import to_device
from server.lora.weights import LoRAWeights
from server.model.attention import FlatAttention, Layout, rows_of
from server.model.fused_ops import last_units
from server.model.kv_cache import KVCache, LayerShape, Span
from server.model.loader import Base
from server.quantization.linear import linears_with_deltas
from server.sequence import Batch, Segment

if TYPE_CHECKING:
    from server.model.layer_graphs import GraphRunner


class ModelRunner:
    """The base, its KV cache and its adapters. ``attention`` is installed in ``model`` already.

    ``groups`` are linears that receive the same tensor; ``kernels`` are its operations. Adapters and copies of
    them take ``adapter_memory`` bytes at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: FlatAttention,
        shapes: Sequence[LayerShape],
        *,
        num_slots: int,
        max_len: int,
        kv_dtype: torch.dtype | None = None,
        groups: Sequence[tuple[str, ...]] = (),
        kernels: Kernels,
        adapter_memory: int | None = None,
    ) -> None:
        self.model, self.attention = model, attention
        self.bank = LoRABank(
            model,
            groups,
            max_seats=num_slots,
            kernels=kernels,
            products=linears_with_deltas(dict(model.named_modules())),
            max_bytes=adapter_memory,
        )
        dtype = model.dtype if kv_dtype is None else kv_dtype
        attention.cache = KVCache(shapes, num_slots=num_slots, max_len=max_len, dtype=dtype, device=model.device)
        attention.rows, attention.chunks = kernels.decode_attention(dtype), kernels.prompt_attention(dtype)
        self.graphs: GraphRunner | None = None
        if kernels.records_layers:
            from server.model.layer_graphs import GraphRunner

            self.graphs = GraphRunner(model, attention, self.bank, kernels)
        self._last_units = last_units(model)

    @classmethod
    def of(
        cls, base: Base, *, num_slots: int, max_len: int | None = None, adapter_memory: int | None = None
    ) -> ModelRunner:
        """For a base as it was loaded, with slots as long as its longest sequence, or shorter."""
        return cls(
            base.model,
            base.attention,
            base.shapes,
            num_slots=num_slots,
            max_len=base.max_model_len if max_len is None else max_len,
            kv_dtype=base.kv_dtype,
            groups=base.groups,
            kernels=base.kernels,
            adapter_memory=adapter_memory,
        )

    @property
    def num_copied_bytes(self) -> int:
        """Memory of the copies of adapters that are computed side by side."""
        return self.bank.num_stacked_bytes

    def arrange(self, batch: Batch) -> Batch:
        """The same rows in the order in which their adapters are computed fastest, for ``run``."""
        return self.bank.arrange(batch)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """Logits of the rows that yield a token, [len(batch.draws), vocab]."""
        self._prepare_slots(batch)
        spans = _spans(batch.segments, self.attention.most_apart)
        ids = [token for segment in batch.segments for token in segment.ids]
        slots, positions, input_ids, ends = to_device(
            self.model.device, *rows_of(spans), ids, _sampled_rows(batch.segments)
        )
        layout = self.attention.layout = Layout(spans, slots, positions)
        self.bank.begin(batch)
        if self.graphs is not None:
            self.graphs.begin(layout)
        if self._last_units is not None:  # which are a whole layer's greater part in a prompt
            self._last_units.only = ends if any(span.length > 1 for span in layout.spans) else None
        output = self.model(
            input_ids=input_ids[None],
            position_ids=layout.positions[None],
            use_cache=False,
            logits_to_keep=ends,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _prepare_slots(self, batch: Batch) -> None:
        cache = self.attention.cache
        assert cache is not None
        for move in batch.moves:
            cache.do(move)
        if self.attention.batched is not None:  # which reads positions that a sequence has not written yet
            for segment in batch.segments:
                if segment.start == segment.sequence.num_cached:
                    cache.clear(segment.slot, segment.start)

    def prepare(self, manifest: Manifest) -> LoRAWeights:
        """An adapter's tensors, for ``add_adapter``; any thread may call this, while steps run.

        Raises ``AdapterRejected`` where they would change nothing.
        """
        return LoRAWeights.of(manifest, self.bank.base_modules, self.bank.groups, self.bank.tiled)

    def add_adapter(self, digest: str, weights: LoRAWeights) -> int:
        """Make an adapter usable; the bytes that it takes."""
        return self.bank.add(digest, weights)

    def remove_adapter(self, digest: str) -> None:
        """Free an adapter."""
        self.bank.remove(digest)


def _spans(segments: Sequence[Segment], apart: int) -> tuple[Span, ...]:
    """A span for each segment's known rows, and one for each draft, so that its numbers are those of a decoding row.

    Known rows are spans of their own as well where they are no more than ``apart``.
    """
    spans, row = [], 0
    for segment in segments:
        known = segment.length - len(segment.drafts)
        if known > apart:
            spans.append(Span(row, segment.start, known, segment.slot))
        alone = range(known if known > apart else 0, segment.length)
        spans += [Span(row + place, segment.start + place, 1, segment.slot) for place in alone]
        row += segment.length
    return tuple(spans)


def _sampled_rows(segments: Sequence[Segment]) -> list[int]:
    """The rows that yield a token: the last ones of each segment."""
    rows: list[int] = []
    row = 0
    for segment in segments:
        row += segment.length
        rows += range(row - segment.num_sampled, row)
    return rows
