"""Builds the adapter services from the settings: library, watcher, operator."""

from __future__ import annotations

from dataclasses import dataclass

from server.adapters.adapter_cache import AdapterCache, Loaded
from server.adapters.adapter_library import AdapterLibrary
from server.adapters.content.manifest import Manifest
from server.adapters.operator import AdapterOperator
from server.adapters.reader import AdapterReader
from server.adapters.registry import AdapterRegistry
from server.adapters.watcher import AdapterWatcher
from server.cli.folders import adapter_folders, open_store, policy_of
from server.engine.async_engine import AsyncEngine
from server.metrics import Metrics
from server.model.loader import Base
from server.model.runner import ModelRunner
from server.settings import Settings
from server.text.prompt import PromptRenderer

COPIES_SHARE = 4
"""One part in this many of the adapter memory is kept free of idle weights, for batched copies of running adapters."""


@dataclass(frozen=True)
class AdapterServices:
    """The library leases adapters, the watcher keeps them up to date, the operator changes them on request."""

    adapters: AdapterLibrary
    watcher: AdapterWatcher
    operator: AdapterOperator


def build_adapter_services(
    settings: Settings, base: Base, runner: ModelRunner, engine: AsyncEngine, prompts: PromptRenderer, metrics: Metrics
) -> AdapterServices:
    """Raises ``SettingsError`` if the state directory cannot be used."""
    store = open_store(settings)
    registry = AdapterRegistry(keep=settings.keep_versions, retain=store is None)

    async def load(manifest: Manifest) -> Loaded:
        weights = await reader.run(runner.prepare, manifest)
        num_bytes = await engine.load_adapter(manifest.weights_digest, weights)
        return Loaded(weights.delta_norm, num_bytes)

    reader = AdapterReader(base.signature, policy_of(settings), store=store, check_defaults=prompts.check_defaults)
    cache = AdapterCache(
        settings.adapter_memory,
        unload=engine.unload_adapter,
        is_wanted=registry.is_wanted,
        max_waiting=settings.max_queued_seqs,
        spare=settings.adapter_memory // COPIES_SHARE if runner.bank.backend.makes_copies else 0,
    )
    adapters = AdapterLibrary(registry, cache, reader, load, base_names=settings.base_names, metrics=metrics)
    watcher = AdapterWatcher(
        adapter_folders(settings),
        adapters,
        settle=settings.scan_interval,
        grace=settings.removal_grace,
        store=store,
    )
    metrics.adapter_memory_limit.set(settings.adapter_memory)
    return AdapterServices(adapters, watcher, AdapterOperator(adapters, watcher, store))
