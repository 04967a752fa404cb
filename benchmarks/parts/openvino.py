"""OpenVINO GenAI's continuous batching, where ``openvino-genai`` is installed: see README.md for how to convert a base.

An adapter is switched on by ``generate``, for the whole pipeline: ``add_request`` ignores the adapters of its config,
and a ``generate`` over several adapters plays the first one for all (both seen in 2026.4 by comparing tokens). So
requests of one adapter run in a closed loop, and mixed ones in one ``generate`` for each adapter, one after another.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parts.engines import Ask


def missing() -> str | None:
    if importlib.util.find_spec("openvino_genai") is None:
        return "openvino-genai is not installed: pip install openvino-genai (see benchmarks/README.md)"
    return None


class OpenVino:
    """A converted base with adapters. ``cache_gb`` is its KV cache."""

    def __init__(self, model: Path, adapters: Sequence[Path], *, max_num_seqs: int, cache_gb: int = 1) -> None:
        self._genai: Any = importlib.import_module("openvino_genai")
        self._tensor: Any = importlib.import_module("openvino").Tensor
        self._adapters = [self._genai.Adapter(str(path / "adapter_model.safetensors")) for path in adapters]
        scheduling = self._genai.SchedulerConfig()
        scheduling.max_num_seqs, scheduling.cache_size = max_num_seqs, cache_gb
        scheduling.max_num_batched_tokens, scheduling.enable_prefix_caching = 512, False
        properties = {"adapters": self._genai.AdapterConfig(self._adapters)} if adapters else {}
        self._pipeline = self._genai.ContinuousBatchingPipeline(str(model), scheduling, "CPU", properties, {})
        self._number = itertools.count()

    def run(self, asks: Sequence[Ask], num_clients: int) -> float:
        """Seconds for all: a closed loop where they share an adapter, else adapter after adapter in each wave."""
        if len({ask.adapter for ask in asks}) > 1:
            return self._in_turn(asks, num_clients)
        self._pipeline.generate([self._ids(asks[0])], [self._config(asks[0], 1)])  # switches the adapter on
        since = time.perf_counter()
        waiting = iter(asks)
        flying: list[Any] = []
        while True:
            while len(flying) < num_clients and (ask := next(waiting, None)) is not None:
                flying.append(self._pipeline.add_request(next(self._number), self._ids(ask), self._config(ask)))
            if not flying:
                return time.perf_counter() - since
            self._pipeline.step()
            flying = [handle for handle in flying if handle.get_status() == self._genai.GenerationStatus.RUNNING]

    def _in_turn(self, asks: Sequence[Ask], num_clients: int) -> float:
        since = time.perf_counter()
        for first in range(0, len(asks), num_clients):
            wave = sorted(asks[first : first + num_clients], key=_adapter)
            for _, group in itertools.groupby(wave, key=_adapter):
                alike = list(group)
                done = self._pipeline.generate([self._ids(ask) for ask in alike], [self._config(ask) for ask in alike])
                assert all(len(result.m_generation_ids[0]) == alike[0].num_tokens for result in done)
        return time.perf_counter() - since

    def _ids(self, ask: Ask) -> Any:
        return self._tensor(np.array([ask.prompt_ids], dtype=np.int64))

    def _config(self, ask: Ask, num_tokens: int | None = None) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens or ask.num_tokens, True, False
        chosen = [] if ask.adapter is None else [self._adapters[ask.adapter]]
        config.adapters = self._genai.AdapterConfig(chosen)
        return config


def _adapter(ask: Ask) -> int:
    return -1 if ask.adapter is None else ask.adapter
