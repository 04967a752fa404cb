"""Builds everything once, from the settings, and serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI
from transformers import GenerationConfig

from server.adapters.manifest import Limits, Manifest
from server.adapters.registry import AdapterDefaults, AdapterRegistry
from server.adapters.watcher import AdapterWatcher
from server.api.app import ServerState, create_app
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.errors import EngineUnavailable, SettingsError
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model.device import available_threads
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.settings import EMBEDDED_BASE, Settings
from server.text.prompt import PromptRenderer

logger = logging.getLogger("quickchange")


@dataclass(frozen=True)
class Service:
    """All parts of a running server."""

    state: ServerState
    engine: AsyncEngine
    watcher: AdapterWatcher
    settings: Settings

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the engine and read the adapters before the first request; stop both after the last."""
        self.engine.start()
        await self.watcher.scan(settled_only=False)
        logger.info("models: %s", ", ".join([self.state.base_name, *(one.name for one in self.state.registry.list())]))
        watching = asyncio.create_task(self.watcher.run(self.settings.scan_interval))
        try:
            yield
        finally:
            watching.cancel()
            await self.engine.stop(self.settings.shutdown_timeout)


def build(settings: Settings) -> Service:
    """Load the base and put every part in its place. Raises a ``StartError`` where that cannot be."""
    since = time.perf_counter()
    torch.set_num_threads(settings.threads or available_threads())
    base = load_base(
        settings.base_model,
        name=settings.base_name,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
    )
    _log_base(base, time.perf_counter() - since)
    metrics = _metrics(base)
    scheduler = Scheduler(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=base.max_model_len,
    )
    runner = _runner(base, settings.max_num_seqs)
    engine = AsyncEngine(Engine(scheduler, runner, Sampler(), metrics), max_queued_seqs=settings.max_queued_seqs)
    registry = AdapterRegistry(engine.unload_adapter)
    state = ServerState(
        base_name=settings.base_name,
        created=int(time.time()),
        prompts=PromptRenderer(base.tokenizer, vocab_size=base.vocab_size),
        engine=engine,
        registry=registry,
        metrics=metrics,
        default_max_tokens=settings.default_max_tokens,
        eos_ids=base.eos_ids,
        base_defaults=_base_defaults(base),
        version=_version(),
    )
    return Service(state, engine, _watcher(settings, base, engine, registry, metrics), settings)


def _runner(base: Base, num_slots: int) -> ModelRunner:
    try:
        return ModelRunner(base.model, base.attention, base.shapes, num_slots=num_slots, max_len=base.max_model_len)
    except (RuntimeError, MemoryError) as error:
        raise SettingsError(
            f"there is no memory for {num_slots} KV slots of {base.max_model_len} tokens: lower --max-num-seqs or "
            f"--max-model-len ({str(error)[:200]})"
        ) from error


def run_server(settings: Settings) -> int:
    """Serve until a signal ends it. The port is bound before the base is loaded: a taken one is told at once."""
    bound = bind(settings.host, settings.port)
    service = build(settings)
    host, port = bound.getsockname()[:2]
    logger.info("serving on http://%s:%d (OpenAI API under /v1)", f"[{host}]" if ":" in host else host, port)
    server = uvicorn.Server(uvicorn_config(service))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _already_stopped)
    server.run(sockets=[bound])
    return 0 if server.started else 1


def _already_stopped(number: int, frame: FrameType | None) -> None:
    """uvicorn raises the signal that stopped it once more when all is done; a stop that was asked for is no failure."""


def uvicorn_config(service: Service) -> uvicorn.Config:
    """uvicorn's settings; requests are logged by us, one line each."""
    return uvicorn.Config(
        create_app(service.state, lifespan=service.lifespan),
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=max(1, int(service.settings.shutdown_timeout)),
        server_header=False,
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket bound, not listening yet. Raises ``SettingsError`` where the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
        ) from None
    return bound


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


def _watcher(
    settings: Settings, base: Base, engine: AsyncEngine, registry: AdapterRegistry, metrics: Metrics
) -> AdapterWatcher:
    async def load(manifest: Manifest) -> None:
        weights = await asyncio.to_thread(LoRAWeights.of, manifest, base.model.device)
        with contextlib.suppress(EngineUnavailable):
            await engine.load_adapter(manifest.weights_digest, weights)

    limits = Limits(settings.max_lora_rank, settings.max_adapter_bytes)
    return AdapterWatcher(
        adapter_folders(settings), registry, load, base=base.signature, limits=limits, metrics=metrics
    )


def _metrics(base: Base) -> Metrics:
    metrics = Metrics()
    metrics.build_info.info({"version": _version(), "torch": torch.__version__})
    metrics.base_model_info.info({"name": base.signature.name, "dtype": str(base.model.dtype).removeprefix("torch.")})
    return metrics


def _log_base(base: Base, seconds: float) -> None:
    logger.info(
        "base %s: %.1fM parameters in %s on %s, %d tokens of context, loaded in %.1f s",
        base.signature.name,
        sum(parameter.numel() for parameter in base.model.parameters()) / 1e6,
        str(base.model.dtype).removeprefix("torch."),
        base.model.device,
        base.max_model_len,
        seconds,
    )


def _base_defaults(base: Base) -> AdapterDefaults:
    """The sampling that the base's makers advise in its generation config."""
    advised = base.model.generation_config or GenerationConfig()
    if advised.do_sample is not True:
        return AdapterDefaults()
    return AdapterDefaults(
        temperature=advised.temperature, top_p=advised.top_p, top_k=advised.top_k, min_p=advised.min_p
    )


def _version() -> str:
    try:
        return version("quickchange")
    except PackageNotFoundError:
        return "0+unknown"
