"""A batch through the base model in one flat forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from cpu_kernels.kernels import Kernels
from server.adapters.content.manifest import Manifest
from server.lora.backend import LoRABackend
from server.lora.bank import LoRABank
from server.lora.batched import BatchedTorchLoRA
from server.lora.transfer import to_device
from server.lora.weights import LoRAWeights
from server.model.attention.interface import AttentionBackend, BackendFactory, FlatAttention, attention_segments
from server.model.fused_ops import last_mlp
from server.model.hidden_states import hidden_sums, last_hidden_states
from server.model.kv_cache import AttentionMetadata, KVCache, LayerShape, slots_and_positions
from server.model.loader import Base
from server.model.patches import ModelPatches
from server.quantization.int8_modules import Int8Linear, linears_with_deltas
from server.sequence import Batch, KVOperation, Segment

if TYPE_CHECKING:
    from server.model.layer_graphs import GraphRunner


class ModelRunner:
    """The base, its KV cache and its adapters. ``attention``, installed in ``model``, gets a backend for the cache.

    ``groups`` are linears that receive the same tensor; ``kernels`` are the model's operations. Adapters and copies of
    them take at most ``adapter_memory`` bytes. Only the newest runner sharing ``patches`` is usable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: FlatAttention,
        shapes: Sequence[LayerShape],
        attention_backend: BackendFactory,
        *,
        num_slots: int,
        max_len: int,
        kv_dtype: torch.dtype | None = None,
        groups: Sequence[tuple[str, ...]] = (),
        kernels: Kernels,
        adapter_memory: int | None = None,
        patches: ModelPatches | None = None,
    ) -> None:
        self.model, self.attention = model, attention
        patches = ModelPatches() if patches is None else patches
        patches.begin("runner")
        self.bank = LoRABank(
            model, _lora_backend(model, groups, max_seqs=num_slots, kernels=kernels), max_bytes=adapter_memory
        )
        patches.on_undo(self.bank.close)
        dtype = model.dtype if kv_dtype is None else kv_dtype
        cache = KVCache(shapes, num_slots=num_slots, max_len=max_len, dtype=dtype, device=model.device)
        attention.backend = attention_backend(cache)
        self.graphs: GraphRunner | None = None
        if kernels.records_layers and attention.backend.is_recordable:
            from server.model.layer_graphs import GraphRunner

            self.graphs = GraphRunner(model, attention, self.bank, kernels, patches)
        self._last_mlp = last_mlp(model)

    @classmethod
    def of(
        cls, base: Base, *, num_slots: int, max_len: int | None = None, adapter_memory: int | None = None
    ) -> ModelRunner:
        """A runner for a loaded base; ``max_len`` is at most, and by default, its longest sequence."""
        return cls(
            base.model,
            base.attention,
            base.shapes,
            base.attention_backend,
            num_slots=num_slots,
            max_len=base.max_model_len if max_len is None else max_len,
            kv_dtype=base.kv_dtype,
            groups=base.groups,
            kernels=base.kernels,
            adapter_memory=adapter_memory,
            patches=base.patches,
        )

    @property
    def attention_backend(self) -> AttentionBackend:
        """The attention backend of the newest runner."""
        assert self.attention.backend is not None, "the base was closed"
        return self.attention.backend

    @property
    def num_copied_bytes(self) -> int:
        """Bytes of adapters beside their own tensors: copies for batched products, and tables."""
        return self.bank.backend.num_bytes

    def apply(self, kv_ops: Iterable[KVOperation]) -> None:
        """Apply KV operations between two steps."""
        for kv_op in kv_ops:
            self.attention_backend.cache.apply(kv_op)

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        """Logits of the batch's draws, [len(draws), vocab], and the batch in the order of the logits.

        Segments are sorted into the order in which their adapters are computed fastest. Sums of hidden states are put
        into the returned batch.
        """
        batch = self.bank.begin_sorted(batch)
        backend = self.attention_backend
        backend.prepare_slots(batch)
        segments = attention_segments(batch.segments, backend.max_single_rows)
        ids = [token for segment in batch.segments for token in segment.ids]
        slots, positions, input_ids, needed = to_device(
            self.model.device, *slots_and_positions(segments), ids, _needed_rows(batch.segments)
        )
        metadata = AttentionMetadata(segments, slots, positions)
        backend.begin(metadata)
        if self.graphs is not None:
            self.graphs.begin(metadata)
        embeds = any(segment.every_row and segment.sequence.params.embedding for segment in batch.segments)
        if self._last_mlp is not None:  # in a prompt, the greater part of the last layer
            skips = not embeds and any(segment.length > 1 for segment in segments)
            self._last_mlp.needed_rows = needed if skips else None
        try:
            with last_hidden_states(self.model) if embeds else nullcontext() as hidden:
                output = self.model(
                    input_ids=input_ids[None],
                    position_ids=positions[None],
                    use_cache=False,
                    logits_to_keep=needed,
                )
        except BaseException:
            self._forget_activations()
            raise
        if hidden is not None:
            batch = replace(batch, hidden_sums=hidden_sums(hidden.states, batch.segments))
        logits: torch.Tensor = output.logits[0]
        return logits, batch

    def _forget_activations(self) -> None:
        """Free the cached outputs of fused linears after a failed step."""
        for module in self.bank.base_modules.values():
            if isinstance(module, Int8Linear):
                module.fused.forget()

    def prepare(self, manifest: Manifest) -> LoRAWeights:
        """An adapter's tensors, for ``add_adapter``; any thread may call this, while steps run.

        Raises ``AdapterRejected`` if they would change nothing.
        """
        return self.bank.prepare(manifest)

    def add_adapter(self, digest: str, weights: LoRAWeights) -> int:
        """Make an adapter usable; returns its bytes."""
        return self.bank.add(digest, weights)

    def remove_adapter(self, digest: str) -> None:
        self.bank.remove(digest)


def _lora_backend(
    model: PreTrainedModel, groups: Sequence[tuple[str, ...]], *, max_seqs: int, kernels: Kernels
) -> LoRABackend:
    if kernels.add_deltas is None:
        return BatchedTorchLoRA(groups, max_slots=max_seqs, device=model.device)
    from server.lora.native import NativeLoRA

    modules = dict(model.named_modules(remove_duplicate=False))
    return NativeLoRA(list(modules), linears_with_deltas(modules), kernels=kernels, max_seqs=max_seqs)


def _needed_rows(segments: Sequence[Segment]) -> list[int]:
    """Rows whose logits are needed: of each segment those of prompt tokens first, those that yield a token last."""
    rows: list[int] = []
    row = 0
    for segment in segments:
        if segment.every_row:
            rows += range(row, row + segment.num_scored)
        row += segment.length
        rows += range(row - segment.num_sampled, row)
    return rows
