"""Outlier channels of a base's linears and experts, measured on several texts and cached for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from base_files.deferred_weights import ReadableWeights
from server.model.attention.probe import ProbingAttention
from server.model.calibration_texts import TEXTS
from server.model.kv_cache import AttentionMetadata, AttentionSegment
from server.model.quantizer import IN_MEMORY, OutlierInputs, collect_outliers, mixtures, quantizable
from server.quantization.int8_experts import WEIGHTS, follow_convention, out_in
from server.quantization.outliers import FACTOR, MOST

logger = logging.getLogger("quickchange.model")

MOST_TOKENS = 64
"""Tokens of each text: with five of them a pass costs 320 rows, once for a base."""
_FORMAT = 2

Sequences = Sequence[Sequence[int]]


def calibration_ids(tokenizer: PreTrainedTokenizerBase, *, max_len: int, vocab_size: int) -> Sequences:
    """The first token ids of each text; texts without a token are left out."""
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"][: min(MOST_TOKENS, max_len)] for text in TEXTS]
    return [[int(token) % vocab_size for token in ids] for ids in texts if ids]


@torch.inference_mode()
def measure_outliers(
    model: PreTrainedModel, probe: ProbingAttention, sequences: Sequences, *, weights: ReadableWeights = IN_MEMORY
) -> OutlierInputs:
    """One pass of the stock model over all texts, each a sequence of its own."""
    segments: list[AttentionSegment] = []
    for ids in sequences:
        segments.append(AttentionSegment(sum(segment.length for segment in segments), 0, len(ids), 0))
    metadata = AttentionMetadata.of(tuple(segments), model.device)
    probe.begin(metadata)
    rows = torch.tensor([[token for ids in sequences for token in ids]], device=model.device)
    with collect_outliers(model, weights) as found:
        model(input_ids=rows, position_ids=metadata.positions[None], use_cache=False)
    return found


@dataclass(frozen=True)
class Calibration:
    """Measures the outliers of one base, whose longest sequence is ``max_len``.

    ``folder``, if any, caches the result. An unreadable or unwritable cache is no error.
    """

    fingerprint: str
    weights: ReadableWeights
    max_len: int
    folder: Path | None = None

    def outliers(
        self, model: PreTrainedModel, probe: ProbingAttention, tokenizer: PreTrainedTokenizerBase
    ) -> OutlierInputs:
        """The outliers of every linear and of experts, from the cache or from a forward pass."""
        vocab_size = model.config.get_text_config().vocab_size
        sequences = calibration_ids(tokenizer, max_len=self.max_len, vocab_size=vocab_size)
        if not sequences:
            return {}
        modules = {**quantizable(model), **mixtures(model)}
        cached = self._cached(sequences, {name: _num_inputs(module) for name, module in modules.items()})
        if cached is not None:
            return cached
        found = measure_outliers(model, probe, sequences, weights=self.weights)
        self._cache(sequences, found)
        return found

    def _cached(self, sequences: Sequences, sizes: Mapping[str, int]) -> OutlierInputs | None:
        """The cached outliers if they are valid for these modules; ``sizes``: inputs of each."""
        if self.folder is None:
            return None
        try:
            cached = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(cached, dict) or cached.get("key") != self._key(sequences):
            return None
        linears = cached.get("linears")
        if not isinstance(linears, dict) or not linears.keys() <= sizes.keys():
            return None
        if not all(_are_inputs(indices, sizes[name]) for name, indices in linears.items()):
            return None
        return {name: torch.tensor(indices) if indices else None for name, indices in linears.items()}

    def _cache(self, sequences: Sequences, found: OutlierInputs) -> None:
        """Write the cache file and rename it into place, so that no reader sees half of it."""
        if self.folder is None:
            return
        linears = {name: [] if indices is None else indices.tolist() for name, indices in found.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{self._path.name}.{os.getpid()}"
            try:
                partial.write_text(json.dumps({"key": self._key(sequences), "linears": linears}), encoding="utf-8")
                partial.replace(self._path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            logger.info("outlier calibration could not be cached: %s", error)

    @property
    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.fingerprint.removeprefix('sha256:')}.json"

    def _key(self, sequences: Sequences) -> str:
        """A digest of everything that the outliers depend on."""
        inputs = json.dumps([_FORMAT, self.fingerprint, FACTOR, MOST, [list(ids) for ids in sequences]])
        return hashlib.sha256(inputs.encode()).hexdigest()


def _num_inputs(module: nn.Module) -> int:
    """Inputs of a linear, or of experts."""
    if follow_convention(module):
        return out_in(module, module.get_parameter(WEIGHTS[0])[0]).shape[1]
    shape = module.get_parameter("weight").shape
    return shape[0] if isinstance(module, Conv1D) else shape[1]


def _are_inputs(indices: Any, size: int) -> bool:
    """Whether these are at most ``MOST`` distinct indices below ``size``, ascending."""
    if not isinstance(indices, list) or len(indices) > MOST or any(type(index) is not int for index in indices):
        return False
    return indices == sorted(set(indices)) and all(0 <= index < size for index in indices)
