"""Builds everything once, from the settings, and serves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI
from transformers import GenerationConfig

from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.watcher import AdapterWatcher
from server.api.app import ServerState, create_app
from server.cli.adapter_services import build_adapter_services
from server.cli.folders import user_cache
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.errors import SettingsError, StartError, StartFailed
from server.metrics import Metrics
from server.model.device import available_threads
from server.model.kv_cache import KVLayout, num_slots_within
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.settings import Settings
from server.text.prompt import PromptRenderer

logger = logging.getLogger("quickchange")

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread hands the interpreter over to one that waits for it.

The engine's thread gives it up at every operation of torch, hundreds in a step, and with Python's 5 ms it would wait as
long to get it back whenever an adapter is read or a request parsed meanwhile.
"""
NUM_CACHES = 64
"""Slots beyond those of running sequences, for prefixes; one that is empty takes addresses, and no memory."""
MOST_NAMES = 20
"""Adapters named in the log at start."""


@dataclass
class Service:
    """All parts of a running server. ``start_error`` is why it did not start, where it did not."""

    state: ServerState
    engine: AsyncEngine
    watcher: AdapterWatcher
    settings: Settings
    start_error: Exception | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the engine and read the adapters before the first request; stop both after the last.

        A start that fails half-way stops what it had started.
        """
        working: list[asyncio.Task[None]] = []
        try:
            await self._start()
            working += [asyncio.create_task(work) for work in (self.watcher.run(), self.state.adapters.sync.hash_all())]
            yield
        finally:
            for task in working:
                task.cancel()
            try:
                await self.engine.stop(self.settings.shutdown_timeout)
            finally:
                self.state.adapters.reader.close()

    async def _start(self) -> None:
        try:
            await self._start_all()
        except Exception as error:
            self.start_error = error
            raise

    async def _start_all(self) -> None:
        await self._quieten_reader()
        self.engine.start()
        await self.watcher.start()
        names = [entry.name for entry in self.state.adapters.registry]
        shown = ", ".join([self.state.base_name, *names[:MOST_NAMES]])
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        logger.info("models: %s%s", shown, more)
        gc.collect()
        gc.freeze()  # what is there now stays: a full collection among it stops every thread for a third of a second

    async def _quieten_reader(self) -> None:
        """Adapters are prepared with one thread, so that the engine's threads need not wait for theirs.

        The number is a thread's own, but a thread that has none yet takes the one that was set last, by whomever.
        """
        num_threads = torch.get_num_threads()
        await self.state.adapters.reader.run(torch.set_num_threads, 1)
        torch.set_num_threads(num_threads)


def build(settings: Settings) -> Service:
    """Load the base and put every part in its place. Raises a ``StartError`` where that cannot be."""
    since = time.perf_counter()
    torch.set_num_threads(settings.threads or available_threads())
    sys.setswitchinterval(SWITCH_INTERVAL)
    base = load_base(
        settings.base_model,
        name=settings.base_name,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        quantization=settings.quantization,
        kv_memory=settings.kv_memory,
        outlier_cache=user_cache("outliers"),
    )
    _log_base(base, time.perf_counter() - since)
    metrics = _metrics(base)
    slots = _slots(settings, base)
    scheduler = Scheduler(
        max_num_seqs=min(settings.max_num_seqs, slots.num_slots),
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=base.max_model_len,
        max_prefill_tokens=settings.max_prefill_tokens,
        slots=slots,
        max_draft_tokens=0 if settings.speculation == "none" else settings.max_draft_tokens,
    )
    runner = _runner(base, slots.num_slots, settings.adapter_memory)
    engine = AsyncEngine(Engine(scheduler, runner, Sampler(), metrics), max_queued_seqs=settings.max_queued_seqs)
    prompts = PromptRenderer(base.tokenizer, vocab_size=base.vocab_size)
    services = build_adapter_services(settings, base, runner, engine, prompts, metrics)
    key = settings.admin_key
    state = ServerState(
        base_name=settings.base_name,
        created=int(time.time()),
        prompts=prompts,
        engine=engine,
        adapters=services.adapters,
        operator=None if key is None else services.operator,
        admin_key_digest=None if key is None else hashlib.sha256(key.get_secret_value().encode()).digest(),
        metrics=metrics,
        default_max_tokens=settings.default_max_tokens,
        eos_ids=base.eos_ids,
        base_defaults=_base_defaults(base),
        version=_version(),
    )
    return Service(state, engine, services.watcher, settings)


def _slots(settings: Settings, base: Base) -> SlotTable:
    """Slots for the sequences that run, and where prefixes are reused as many more as keep some."""
    layout = KVLayout(tuple(base.shapes), base.max_model_len, base.kv_dtype)
    wanted = settings.max_num_seqs + (NUM_CACHES if settings.prefix_caching else 0)
    num_slots = num_slots_within(settings.kv_memory, layout, base.model.device, wanted=wanted)
    if num_slots < settings.max_num_seqs:
        logger.warning(
            "kv_memory holds %d sequences of %d tokens, and %s takes memory for whole ones: no more are computed at "
            "once; lower --max-model-len, or raise --kv-memory",
            num_slots,
            base.max_model_len,
            base.model.device,
        )
    return SlotTable(
        num_slots,
        max_len=base.max_model_len,
        max_bytes=settings.kv_memory,
        bytes_of=layout.bytes_of,
        reuses=settings.prefix_caching,
    )


def _runner(base: Base, num_slots: int, adapter_memory: int) -> ModelRunner:
    try:
        return ModelRunner.of(base, num_slots=num_slots, adapter_memory=adapter_memory)
    except (RuntimeError, MemoryError, OSError) as error:
        raise SettingsError(
            f"there is no memory for {num_slots} KV slots of {base.max_model_len} tokens: lower --max-num-seqs or "
            f"--max-model-len ({str(error)[:200]})"
        ) from error


def run_server(settings: Settings, bound: socket.socket) -> int:
    """Serve on a socket that is bound, until a signal ends it. Raises a ``StartError`` where the start fails."""
    service = build(settings)
    host, port = bound.getsockname()[:2]
    logger.info("serving on http://%s:%d (OpenAI API under /v1)", f"[{host}]" if ":" in host else host, port)
    server = uvicorn.Server(uvicorn_config(service))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _already_stopped)
    try:
        server.run(sockets=[bound])
    except SystemExit:  # how uvicorn ends where the lifespan did not begin
        if service.start_error is None:
            raise
    if (error := service.start_error) is not None:
        raise error if isinstance(error, StartError) else StartFailed(error) from error
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


def _metrics(base: Base) -> Metrics:
    metrics = Metrics()
    metrics.build_info.info({"version": _version(), "torch": torch.__version__})
    metrics.base_model_info.info(
        {
            "name": base.signature.name,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "quantization": "none" if base.quantized is None else "int8",
        }
    )
    return metrics


def _log_base(base: Base, seconds: float) -> None:
    quantized, dtype = base.quantized, str(base.model.dtype).removeprefix("torch.")
    parameters = [parameter.numel() for parameter in base.model.parameters()]
    logger.info(
        "base %s: %.1fM parameters in %s on %s, %d tokens of context, loaded in %.1f s",
        base.signature.name,
        (sum(parameters) if quantized is None else quantized.num_parameters) / 1e6,
        dtype if quantized is None else "int8",
        base.model.device,
        base.max_model_len,
        seconds,
    )
    if quantized is not None:
        logger.info(
            "int8 by %s: %d linears and the embedding, %.0f MB, with %d columns of large inputs in floats; left in %s: "
            "%.1f MB%s",
            quantized.kernel,
            quantized.num_linears,
            quantized.num_bytes / 1e6,
            quantized.num_outliers,
            dtype,
            sum(quantized.left.values()) / 1e6,
            _largest_left(quantized.left),
        )


def _largest_left(left: Mapping[str, int]) -> str:
    """What takes a megabyte or more, as the experts of a mixture."""
    large = sorted((name for name in left if left[name] >= 1_000_000), key=lambda name: -left[name])
    return f", above all {', '.join(large[:3])}{' ...' if len(large) > 3 else ''}" if large else ""


def _base_defaults(base: Base) -> GenerationDefaults:
    """The sampling that the base's makers advise in its generation config."""
    advised = base.model.generation_config or GenerationConfig()
    if advised.do_sample is not True:
        return GenerationDefaults()
    return GenerationDefaults(
        temperature=advised.temperature, top_p=advised.top_p, top_k=advised.top_k, min_p=advised.min_p
    )


def _version() -> str:
    try:
        return version("quickchange")
    except PackageNotFoundError:
        return "0+unknown"
