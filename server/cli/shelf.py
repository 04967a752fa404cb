"""Builds what keeps adapters, from the settings: folders, state directory, memory, and the engine behind them."""

from __future__ import annotations

from dataclasses import dataclass

from server.adapters.adapter_cache import AdapterCache
from server.adapters.content.manifest import Manifest
from server.adapters.intake import Intake
from server.adapters.leases import Loaded
from server.adapters.leasing import AdapterLibrary
from server.adapters.operator import AdapterOperator
from server.adapters.reader import AdapterReader
from server.adapters.registry import AdapterRegistry
from server.adapters.watcher import AdapterWatcher
from server.cli.folders import adapter_folders, limits_of, open_store
from server.engine.async_engine import AsyncEngine
from server.metrics import Metrics
from server.model.loader import Base
from server.model.runner import ModelRunner
from server.settings import Settings
from server.text.prompt import PromptRenderer

COPIES_SHARE = 4
"""One part in so many of the adapters' memory is kept free of idle weights, for copies of adapters that run."""


@dataclass(frozen=True)
class Shelf:
    """The parts that keep adapters."""

    lender: AdapterLibrary
    watcher: AdapterWatcher
    operator: AdapterOperator


def build_shelf(
    settings: Settings, base: Base, runner: ModelRunner, engine: AsyncEngine, prompts: PromptRenderer, metrics: Metrics
) -> Shelf:
    """Put the parts together. Raises ``SettingsError`` where the state directory cannot be used."""
    store = open_store(settings)
    registry = AdapterRegistry(keep=settings.keep_versions, retain=store is None)

    async def load(manifest: Manifest) -> Loaded:
        weights = await reader.run(runner.prepare, manifest)
        num_bytes = await engine.load_adapter(manifest.weights_digest, weights)
        return Loaded(weights.delta_norm, num_bytes)

    reader = AdapterReader(base.signature, limits_of(settings), store=store, judge_manners=prompts.check_manners)
    cache = AdapterCache(
        settings.adapter_memory,
        unload=engine.unload_adapter,
        is_wanted=registry.is_wanted,
        max_waiting=settings.max_queued_seqs,
        spare=settings.adapter_memory // COPIES_SHARE if runner.bank.copies else 0,
    )
    intake = Intake(registry, reader, metrics=metrics)
    library = AdapterLibrary(registry, cache, intake, reader, load)
    watcher = AdapterWatcher(
        adapter_folders(settings),
        intake,
        settle=settings.scan_interval,
        grace=settings.removal_grace,
        store=store,
        on_aliases=library.set_aliases,
        on_pins=library.set_pins,
    )
    metrics.adapter_memory_limit.set(settings.adapter_memory)
    return Shelf(library, watcher, AdapterOperator(library, watcher, store))
