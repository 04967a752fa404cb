"""Builds the server from the settings, and runs it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import uvicorn
from fastapi import FastAPI
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from cpu_kernels.cores import find_cores
from cpu_kernels.tiers import describe_tier
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.watcher import AdapterWatcher
from server.api.app import create_app
from server.api.auth.access import Access
from server.api.state import BaseSize, ServerState
from server.api.tracing import otlp_tracer
from server.api.vllm_metrics import VllmMetrics
from server.cli.adapter_services import build_adapter_services
from server.cli.folders import user_cache
from server.cli.freed_memory import return_freed_memory
from server.cli.http_protocol import BACKLOG, ContractH11Protocol
from server.cli.http_server import HttpServer
from server.cli.reload import Reloader
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.errors import SettingsError, StartError, StartFailed, first
from server.metrics import Metrics
from server.model.kv_cache import KVLayout, num_slots_within
from server.model.loader import Base, load_base
from server.model.logprobs import max_scored_rows
from server.model.mapped_files import trim
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.settings import Settings
from server.text.prompt import PromptRenderer

logger = logging.getLogger("quickchange")

SWITCH_INTERVAL = 0.0005
"""Seconds until a thread must release the GIL to a waiting thread.

The engine thread releases the GIL at every torch operation, hundreds of times in a step. With Python's default of 5 ms
it would wait that long to get the GIL back while an adapter is read or a request is parsed.
"""
NUM_CACHES = 64
"""KV slots for cached prefixes, in addition to those of running sequences. An empty slot takes address space only."""
MAX_HEADER_BYTES = 64 * 1024
"""Maximum size of a request's headers together."""
MOST_NAMES = 20
"""Maximum number of adapters that the log names at start."""


@dataclass
class Service:
    """All parts of a running server. ``start_error`` is the exception of a failed start."""

    state: ServerState
    engine: AsyncEngine
    watcher: AdapterWatcher
    settings: Settings
    reloader: Reloader | None = None
    start_error: Exception | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the engine and read the adapters before the first request; stop both after the last.

        If the start fails, the parts that were started are stopped.
        """
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._start()
            if self.reloader is not None:
                self.reloader.start(self.watcher)
            tasks.append(asyncio.create_task(self.watcher.run()))
            tasks.append(asyncio.create_task(self.state.adapters.sync.hash_all()))
            tasks.append(
                asyncio.create_task(return_freed_memory(self.state.lifecycle, self.engine.release_cached, trim))
            )
            self.state.lifecycle.started = True
            yield
        finally:
            for task in tasks:
                task.cancel()
            try:
                await self.engine.stop(0)  # the requests have ended
            finally:
                self.state.adapters.reader.close()
                if self.state.tracer is not None:
                    await asyncio.to_thread(self.state.tracer.close)

    async def _start(self) -> None:
        try:
            await self._limit_reader_threads()
            self.engine.start()
            await self.watcher.start()
        except Exception as error:
            self.start_error = error
            raise
        names = [entry.name for entry in self.state.adapters.registry]
        shown = ", ".join([self.state.base_name, *names[:MOST_NAMES]])
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        logger.info("models: %s%s", shown, more)
        gc.collect()
        gc.freeze()  # these objects are permanent; a full collection over them stops all threads for 0.3 s

    async def _limit_reader_threads(self) -> None:
        """Prepare adapters with one OpenMP thread, so that they do not compete with the engine's threads.

        The setting is per thread, but a thread without one inherits the value that any thread set last.
        """
        num_threads = torch.get_num_threads()
        await self.state.adapters.reader.run(torch.set_num_threads, 1)
        torch.set_num_threads(num_threads)


def build(settings: Settings, access: Access) -> Service:
    """Load the base and build all parts of the server. Raises ``StartError``."""
    since = time.perf_counter()
    _set_threads(settings.threads)
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
    scheduler = _scheduler(settings, base, slots)
    runner = _runner(base, slots.num_slots, settings.adapter_memory)
    engine = _engine(settings, Engine(scheduler, runner, Sampler(base.kernels.softmax_rows), metrics))
    prompts = PromptRenderer(base.tokenizer, vocab_size=base.vocab_size, max_model_len=base.max_model_len)
    services = build_adapter_services(settings, base, runner, engine, prompts, metrics)
    if settings.metrics_alias == "vllm":
        kv_tokens = slots.max_bytes // slots.bytes_per_token
        aliases = VllmMetrics(metrics, services.adapters, model_name=settings.base_name, kv_tokens=kv_tokens)
        metrics.registry.register(aliases)
    tracer = None
    if settings.otlp_endpoint is not None:
        tracer = otlp_tracer(settings.otlp_endpoint, base=settings.base_name, version=_version())
    state = ServerState(
        created=int(time.time()),
        prompts=prompts,
        engine=engine,
        adapters=services.adapters,
        operator=services.operator,
        access=access,
        tracer=tracer,
        metrics=metrics,
        default_max_tokens=settings.default_max_tokens,
        sse_ping=settings.sse_ping,
        strict_fields=settings.strict_fields,
        eos_ids=base.eos_ids,
        base_defaults=_base_defaults(base),
        version=_version(),
        computation=_computation(base),
        base_size=BaseSize(base.num_parameters, base.num_bytes, base.hidden_size, base.number_format),
    )
    return Service(state, engine, services.watcher, settings)


def _engine(settings: Settings, engine: Engine) -> AsyncEngine:
    return AsyncEngine(
        engine,
        max_queued_seqs=settings.max_queued_seqs,
        max_owner_share=settings.max_key_share,
        queue_timeout=settings.queue_timeout,
    )


def _scheduler(settings: Settings, base: Base, slots: SlotTable) -> Scheduler:
    return Scheduler(
        max_num_seqs=min(settings.max_num_seqs, slots.num_slots),
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=base.max_model_len,
        max_prefill_tokens=settings.max_prefill_tokens,
        slots=slots,
        max_owner_share=settings.max_key_share,
        max_draft_tokens=0 if settings.speculation == "none" else settings.max_draft_tokens,
        max_scored_rows=max_scored_rows(base.vocab_size),
    )


def _slots(settings: Settings, base: Base) -> SlotTable:
    """KV slots for running sequences, and for others: cached prefixes, and sequences that pause for another key's."""
    layout = KVLayout(tuple(base.shapes), base.max_model_len, base.kv_dtype)
    wanted = settings.max_num_seqs + (NUM_CACHES if settings.prefix_caching else -(-settings.max_num_seqs // 2))
    num_slots = num_slots_within(settings.kv_memory, layout, base.model.device, wanted=wanted)
    if num_slots < settings.max_num_seqs:
        logger.warning(
            "kv_memory is %d bytes, enough for %d sequences of %d tokens, which %s allocates whole: at most %d "
            "sequences run at once instead of %d; raise --kv-memory or lower --max-model-len",
            settings.kv_memory,
            num_slots,
            base.max_model_len,
            base.model.device,
            num_slots,
            settings.max_num_seqs,
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
            f"{num_slots} KV slots of {base.max_model_len} tokens do not fit into memory ({str(error)[:200]}): lower "
            "--max-num-seqs or --max-model-len"
        ) from error


def run_server(
    settings: Settings, sockets: Sequence[socket.socket], access: Access, reloader: Reloader | None = None
) -> int:
    """Serve on bound sockets until a signal stops the server. Raises ``StartError``."""
    transformers_logging.disable_default_handler()  # its lines are of the server's format, such as JSON
    transformers_logging.enable_propagation()
    service = build(settings, access)
    service.reloader = reloader
    is_tls = settings.ssl_certfile is not None
    urls = [url_of(each, is_tls=is_tls) for each in sockets]
    logger.info("serving on %s (OpenAI API under /v1)", " and ".join(urls))
    server = HttpServer(
        uvicorn_config(service),
        lifecycle=service.state.lifecycle,
        engine=service.engine,
        drain_seconds=settings.shutdown_timeout,
    )
    try:
        server.run(sockets=list(sockets))
    except SystemExit:  # uvicorn exits so when the lifespan fails
        if service.start_error is None:
            raise
    error = service.start_error
    if error is not None:
        raise error if isinstance(error, StartError) else StartFailed(error) from error
    return server.exit_status if server.started else 1


def url_of(bound: socket.socket, *, is_tls: bool) -> str:
    """The URL that a bound socket answers under."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if is_tls else 'http'}://{shown}:{port}"


def uvicorn_config(service: Service) -> uvicorn.Config:
    """uvicorn's settings. Its access log is off: the API logs one line per request.

    HTTP is read by h11; httptools, uvicorn's choice where it is installed, loses the body of a request that offers an
    upgrade to HTTP/2. Headers of proxies (X-Forwarded-For) are not believed, and nothing depends on them.
    Idle connections stay open longer than clients keep them (httpx: 5 s, uvicorn's own default), so that no client
    sends a request on a connection that the server is closing.
    """
    return uvicorn.Config(
        create_app(service.state, lifespan=service.lifespan),
        access_log=False,
        log_config=None,
        timeout_keep_alive=75,
        backlog=BACKLOG,
        timeout_graceful_shutdown=1,  # ``HttpServer`` has waited for the requests
        server_header=False,
        http=ContractH11Protocol,
        ws="none",
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ssl_certfile=service.settings.ssl_certfile,
        ssl_keyfile=service.settings.ssl_keyfile,
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


def _set_threads(threads: int | None) -> None:
    cores = find_cores()
    torch.set_num_threads(threads or cores.default_threads)
    logger.info("threads: %d%s; this process may use %s", torch.get_num_threads(), " as set" if threads else "", cores)
    logger.info("instruction set: %s", describe_tier())


def _log_base(base: Base, seconds: float) -> None:
    quantized = base.quantized
    logger.info(
        "base %s: %.1fM parameters, %s, device %s, context of %d tokens, loaded in %.1f s",
        base.signature.name,
        base.num_parameters / 1e6,
        base.number_format,
        base.model.device,
        base.max_model_len,
        seconds,
    )
    if quantized is not None:
        logger.info(
            "int8 (%s kernels): %d linear layers%s and the embedding, %.0f MB, %d outlier channels; "
            "unquantized, in %s: %.1f MB%s",
            quantized.kernel,
            quantized.num_linears,
            f", {quantized.num_experts} experts" if quantized.num_experts else "",
            quantized.num_bytes / 1e6,
            quantized.num_outliers,
            str(base.model.dtype).removeprefix("torch."),
            sum(quantized.unquantized.values()) / 1e6,
            _largest_unquantized(quantized.unquantized),
        )


def _largest_unquantized(sizes: Mapping[str, int]) -> str:
    """The names of unquantized modules of 1 MB or more, such as the experts of a mixture."""
    large = sorted((name for name in sizes if sizes[name] >= 1_000_000), key=lambda name: -sizes[name])
    return f", most of it in {first(large)}" if large else ""


def _base_defaults(base: Base) -> GenerationDefaults:
    """The sampling parameters in the base's ``generation_config.json``."""
    config = base.model.generation_config or GenerationConfig()
    if config.do_sample is not True:
        return GenerationDefaults()
    return GenerationDefaults(
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, min_p=config.min_p
    )


def _computation(base: Base) -> str:
    """The base by the digest of its weights, its device, number formats and kernels: what decides the last bits."""
    signature = base.signature
    weights = signature.fingerprint_v2 or signature.fingerprint or signature.name
    formats = f"{base.model.dtype} kv={base.kv_dtype}"
    kernels = f"int8={base.kernels.linear_name} native={base.kernels.is_native}"
    return f"{weights} {base.model.device.type} {formats} {kernels}"


def _version() -> str:
    try:
        return version("quickchange")
    except PackageNotFoundError:
        return "0+unknown"
