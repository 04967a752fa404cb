"""Adapter folders for tests, on a base of two small linears, and a harness that loads them without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from server.adapters.adapter_cache import AdapterCache, Loaded
from server.adapters.adapter_library import AdapterLibrary
from server.adapters.content.manifest import AdapterPolicy, Manifest
from server.adapters.content.signature import BaseSignature, linear
from server.adapters.operator import AdapterOperator
from server.adapters.reader import AdapterReader
from server.adapters.registry import AdapterRegistry
from server.adapters.versions import VersionStore
from server.adapters.watcher import AdapterWatcher
from server.errors import AdapterRejected
from server.metrics import Metrics

FINGERPRINT = "sha256:" + "a" * 64
BASE = BaseSignature(
    "base", FINGERPRINT, {"model.layers.0.q_proj": linear(6, 4), "model.layers.0.v_proj": linear(6, 2)}
)
LIMITS = AdapterPolicy(max_rank=8, max_bytes=100_000)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}
PREFIX = "base_model.model.model.layers.0."
SIDECAR: dict[str, Any] = {
    "schema_version": 1,
    "base": {"name": "base", "fingerprint": FINGERPRINT},
    "created": "2026-01-01T00:00:00Z",
    "stop": ["###"],
}
NUM_BYTES = 4 * 2 * (6 + 4 + 6 + 2)
"""What one of these adapters takes in memory."""


def tensors() -> dict[str, torch.Tensor]:
    """A good adapter of rank 2 on both modules."""
    return {
        f"{PREFIX}q_proj.lora_A.weight": torch.ones(2, 6),
        f"{PREFIX}q_proj.lora_B.weight": torch.ones(4, 2),
        f"{PREFIX}v_proj.lora_A.weight": torch.ones(2, 6),
        f"{PREFIX}v_proj.lora_B.weight": torch.ones(2, 2),
    }


def write(path: Path, **parts: Any) -> None:
    """Write or replace files of an adapter folder."""
    if "config" in parts:
        (path / "adapter_config.json").write_text(json.dumps(parts["config"]))
    if "weights" in parts:
        safetensors.torch.save_file(parts["weights"], path / "adapter_model.safetensors")
    if "sidecar" in parts:
        (path / "quickchange.json").write_text(json.dumps(parts["sidecar"]))


def make(folder: Path, name: str, **config: Any) -> Path:
    """A good adapter; fields of its config make it another one, or a bad one."""
    path = folder / name
    path.mkdir(parents=True)
    write(path, config=CONFIG | config, weights=tensors())
    return path


class AdapterHarness:
    """Everything that keeps adapters, on two folders, without an engine: what it would load and free is noted."""

    def __init__(
        self,
        root: Path,
        *,
        room: int = 100,
        settle: float = 0.0,
        grace: float = 0.0,
        state: bool = False,
        roots: Sequence[Path] = (),
    ) -> None:
        self.first, self.second = root / "first", root / "second"
        self.first.mkdir(exist_ok=True)
        self.second.mkdir(exist_ok=True)
        self.loaded: list[str] = []
        self.freed: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.metrics = Metrics()
        self.store = VersionStore(root / "state", keep=3) if state else None
        self.registry = AdapterRegistry(keep=3, retain=not state)
        self.reader = AdapterReader(BASE, replace(LIMITS, roots=tuple(roots)), store=self.store)
        self.cache = AdapterCache(
            room * NUM_BYTES, unload=self.freed.append, is_wanted=self.registry.is_wanted, max_waiting=8
        )
        self.adapters = AdapterLibrary(
            self.registry, self.cache, self.reader, self._load, base_names=(BASE.name,), metrics=self.metrics
        )
        self.sync = self.adapters.sync
        self.watcher = AdapterWatcher(
            [self.first, self.second],
            self.adapters,
            settle=settle,
            grace=grace,
            store=self.store,
        )
        self.operator = AdapterOperator(self.adapters, self.watcher, self.store)

    async def _load(self, manifest: Manifest) -> Loaded:
        await self.gate.wait()
        if manifest.name == "unloadable":
            raise AdapterRejected(manifest.name, "no")
        self.loaded.append(manifest.name)
        return Loaded(1.0, NUM_BYTES)

    @property
    def names(self) -> list[str]:
        """Who can be asked for."""
        return [entry.name for entry in self.registry]

    async def version(self, name: str) -> str:
        """The digest of the version that a name means."""
        return (await self.adapters.served(name)).version_digest

    async def use(self, model: str) -> str:
        """Ask for a model once; the label of what answered."""
        lease = await self.adapters.acquire(model)
        lease.release()
        return lease.label
