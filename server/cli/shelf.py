"""Builds what keeps adapters, from the settings: folders, state directory, memory, and the engine behind them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from server.adapters.intake import Intake
from server.adapters.library import AdapterLibrary
from server.adapters.manifest import Limits, Manifest
from server.adapters.manners import AdapterDefaults
from server.adapters.operator import AdapterOperator
from server.adapters.reader import AdapterReader
from server.adapters.registry import AdapterRegistry
from server.adapters.residency import Residency
from server.adapters.versions import VersionStore
from server.adapters.watcher import AdapterWatcher
from server.engine.async_engine import AsyncEngine
from server.errors import SettingsError
from server.metrics import Metrics
from server.model.loader import Base
from server.model.runner import ModelRunner
from server.settings import EMBEDDED_BASE, Settings
from server.text.prompt import PromptRenderer


@dataclass(frozen=True)
class Shelf:
    """The parts that keep adapters."""

    library: AdapterLibrary
    watcher: AdapterWatcher
    operator: AdapterOperator


def build_shelf(
    settings: Settings, base: Base, runner: ModelRunner, engine: AsyncEngine, prompts: PromptRenderer, metrics: Metrics
) -> Shelf:
    """Put the parts together. Raises ``SettingsError`` where the state directory cannot be used."""
    store = open_store(settings)
    registry = AdapterRegistry(keep=settings.keep_versions, retain=store is None)

    def judge_manners(defaults: AdapterDefaults) -> None:
        if defaults.chat_template is not None:
            prompts.check_template(defaults.chat_template)

    async def load(manifest: Manifest) -> float:
        weights = await reader.run(runner.prepare, manifest)
        await engine.load_adapter(manifest.weights_digest, weights)
        return weights.delta_norm

    reader = AdapterReader(base.signature, limits_of(settings), store=store, judge_manners=judge_manners)
    residency = Residency(settings.adapter_memory, unload=engine.unload_adapter, is_wanted=registry.is_wanted)
    intake = Intake(registry, reader, metrics=metrics)
    library = AdapterLibrary(registry, residency, intake, reader, load, max_waiting=settings.max_queued_seqs)
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


def limits_of(settings: Settings) -> Limits:
    """What an adapter may be."""
    return Limits(
        max_rank=settings.max_lora_rank,
        max_bytes=settings.max_adapter_bytes,
        max_memory=settings.adapter_memory,
        trust_chat_templates=settings.trust_chat_templates,
    )


def open_store(settings: Settings) -> VersionStore | None:
    """The state directory, where one is set. Raises ``SettingsError`` where it cannot be made."""
    if settings.state_dir is None:
        return None
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"state_dir {settings.state_dir} cannot be made ({error.strerror})") from None
    return VersionStore(settings.state_dir, keep=settings.keep_versions)


def demo_adapters() -> Path | None:
    """The adapters that come with the package; in a source checkout, its ``adapters`` folder."""
    package = Path(str(files("micro_base")))
    for folder in (package / "adapters", package.parent / "adapters"):
        if folder.is_dir():
            return folder
    return None


def adapter_folders(settings: Settings) -> list[Path]:
    """The operator's folder, then the demo adapters where the base is theirs."""
    demos = demo_adapters() if settings.demo_adapters and settings.base_model == EMBEDDED_BASE else None
    if demos is None or demos.resolve() == settings.adapters_dir.resolve():
        return [settings.adapters_dir]
    return [settings.adapters_dir, demos]
