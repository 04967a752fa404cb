"""Which inputs of a base's linears stand out: measured on texts of several kinds, and kept for the next start."""

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

from server.model.attention.probe import ProbingAttention
from server.model.calibration_texts import TEXTS
from server.model.kv_cache import AttentionMetadata, AttentionSegment
from server.model.quantizer import OutlierInputs, noting_outliers, quantizable
from server.quantization.outliers import FACTOR, MOST

logger = logging.getLogger("quickchange.model")

MOST_TOKENS = 64
"""Tokens of each text: with five of them a pass costs 320 rows, once for a base."""
_FORMAT = 1

Sequences = Sequence[Sequence[int]]


def calibration_ids(tokenizer: PreTrainedTokenizerBase, *, max_len: int, vocab_size: int) -> Sequences:
    """Each text as the first of its token ids; texts that a tokenizer makes nothing of are left out."""
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"][: min(MOST_TOKENS, max_len)] for text in TEXTS]
    return [[int(token) % vocab_size for token in ids] for ids in texts if ids]


@torch.inference_mode()
def measure_outliers(
    model: PreTrainedModel, probe: ProbingAttention, sequences: Sequences, *, files: Sequence[Path] = ()
) -> OutlierInputs:
    """One pass of the stock model over all texts, each a sequence of its own; ``files`` hold its weights."""
    segments: list[AttentionSegment] = []
    for ids in sequences:
        segments.append(AttentionSegment(sum(segment.length for segment in segments), 0, len(ids), 0))
    metadata = AttentionMetadata.of(tuple(segments), model.device)
    probe.begin(metadata)
    rows = torch.tensor([[token for ids in sequences for token in ids]], device=model.device)
    with noting_outliers(model, files=files) as found:
        model(input_ids=rows, position_ids=metadata.positions[None], use_cache=False)
    return found


@dataclass(frozen=True)
class Calibration:
    """What is measured of one base, whose weights are in ``files`` and whose sequences have ``max_len`` tokens at most.

    ``folder``, where there is one, keeps it for the next start. Nothing that is wrong with that is an error.
    """

    fingerprint: str
    files: Sequence[Path]
    max_len: int
    folder: Path | None = None

    def outliers(
        self, model: PreTrainedModel, probe: ProbingAttention, tokenizer: PreTrainedTokenizerBase
    ) -> OutlierInputs:
        """Inputs of its linears that stand out, as they were kept or as a pass shows."""
        vocab_size = model.config.get_text_config().vocab_size
        sequences = calibration_ids(tokenizer, max_len=self.max_len, vocab_size=vocab_size)
        if not sequences:
            return {}
        kept = self._get(sequences, {name: _num_inputs(linear) for name, linear in quantizable(model).items()})
        if kept is not None:
            return kept
        found = measure_outliers(model, probe, sequences, files=self.files)
        self._put(sequences, found)
        return found

    def _get(self, sequences: Sequences, sizes: Mapping[str, int]) -> OutlierInputs | None:
        """What was kept, if it is whole and fits the linears, of which ``sizes`` are the numbers of inputs."""
        if self.folder is None:
            return None
        try:
            kept = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(kept, dict) or kept.get("key") != self._key(sequences):
            return None
        linears = kept.get("linears")
        if not isinstance(linears, dict) or not linears.keys() <= sizes.keys():
            return None
        if not all(_are_inputs(indices, sizes[name]) for name, indices in linears.items()):
            return None
        return {name: torch.tensor(indices) if indices else None for name, indices in linears.items()}

    def _put(self, sequences: Sequences, found: OutlierInputs) -> None:
        """Keep what was measured, by one rename, so that no other start reads half of it."""
        if self.folder is None:
            return
        linears = {name: [] if indices is None else indices.tolist() for name, indices in found.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{self._path.name}.{os.getpid()}"
            partial.write_text(json.dumps({"key": self._key(sequences), "linears": linears}), encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            logger.info("what was measured of the base is not kept for the next start: %s", error)

    @property
    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.fingerprint.removeprefix('sha256:')}.json"

    def _key(self, sequences: Sequences) -> str:
        """A digest of everything that what is measured depends on."""
        said = json.dumps([_FORMAT, self.fingerprint, FACTOR, MOST, [list(ids) for ids in sequences]])
        return hashlib.sha256(said.encode()).hexdigest()


def _num_inputs(linear: nn.Module) -> int:
    shape = linear.get_parameter("weight").shape
    return shape[0] if isinstance(linear, Conv1D) else shape[1]


def _are_inputs(indices: Any, size: int) -> bool:
    """Whether these are a few inputs of a linear, in order."""
    if not isinstance(indices, list) or len(indices) > MOST or any(type(one) is not int for one in indices):
        return False
    return indices == sorted(set(indices)) and all(0 <= one < size for one in indices)
