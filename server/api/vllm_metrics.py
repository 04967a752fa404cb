"""Metrics under vLLM's names, for gateways and routers that know only those (``--metrics-alias vllm``).

Values are read from our own metrics at each scrape. Readers of these names: the endpoint picker of the Kubernetes
Gateway API Inference Extension (queue, running, KV usage, adapters, cache config) and vLLM's production stack, whose
router still reads the three names that begin with ``gpu_``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from server.adapters.adapter_library import AdapterLibrary
from server.metrics import Metrics

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

BLOCK_TOKENS = 16
"""Tokens of a block in ``vllm:cache_config_info``; vLLM's default. The server itself reserves memory by sequence."""
_FINISH_REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length", "cancelled": "abort"}


class VllmMetrics(Collector):
    """Register it with ``metrics.registry``. ``kv_tokens`` is the number of tokens that fit into the KV memory."""

    def __init__(self, metrics: Metrics, adapters: AdapterLibrary, *, model_name: str, kv_tokens: int) -> None:
        self._metrics, self._adapters = metrics, adapters
        self._kv_tokens = kv_tokens
        self._labels = {"model_name": model_name, "engine": "0"}

    def describe(self) -> Iterable[Family]:
        """Nothing, so that registering does not read values: the engine may not run yet."""
        return ()

    def collect(self) -> Iterator[Family]:
        yield from self._gauges()
        yield from self._counters()
        yield self._adapter_info()
        yield self._cache_config()
        metrics = self._metrics
        yield self._histogram("vllm:time_to_first_token_seconds", "Time to first token.", metrics.time_to_first_token)
        for name in ("vllm:time_per_output_token_seconds", "vllm:request_time_per_output_token_seconds"):
            yield self._histogram(name, "Mean time per output token of an answer.", metrics.time_per_output_token)
        yield self._histogram("vllm:e2e_request_latency_seconds", "Duration of requests.", metrics.request_duration)

    def _gauges(self) -> Iterator[Family]:
        metrics = self._metrics
        limit = _total(metrics.kv_memory_limit)
        usage = _total(metrics.kv_memory_used) / limit if limit else 0.0
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", _total(metrics.running))
        yield self._gauge("vllm:num_requests_waiting", "Sequences in the queue.", _total(metrics.queued))
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV memory in use, 0 to 1.", usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "Former name of vllm:kv_cache_usage_perc.", usage)

    def _counters(self) -> Iterator[Family]:
        metrics = self._metrics
        prompt, cached = _total(metrics.prompt_tokens), _total(metrics.cached_tokens)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens.", prompt)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", _total(metrics.generated_tokens))
        for former in ("", "gpu_"):
            yield self._counter(f"vllm:{former}prefix_cache_queries", "Prompt tokens looked up in the cache.", prompt)
            yield self._counter(f"vllm:{former}prefix_cache_hits", "Prompt tokens found in the cache.", cached)
        success = CounterMetricFamily(
            "vllm:request_success", "Answers by reason of their end.", labels=[*self._labels, "finished_reason"]
        )
        counts = dict.fromkeys(_FINISH_REASONS.values(), 0.0)
        for sample in _samples(metrics.requests, "_total"):
            if (name := _FINISH_REASONS.get(sample.labels["finish_reason"])) is not None:
                counts[name] += sample.value
        for name, count in counts.items():
            success.add_metric([*self._labels.values(), name], count)
        yield success

    def _adapter_info(self) -> Family:
        """One series, of which readers take the one with the highest value: the time.

        Adapters in memory count as running, because a request for one starts at once; ``max_lora`` is the number that
        the adapter memory holds at their mean size.
        """
        cache = self._adapters.cache
        resident = cache.digests
        limit = cache.max_bytes * len(resident) // max(cache.num_bytes, 1) if resident else len(self._adapters.registry)
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters in memory, and adapters being loaded or waiting for memory; the value is the Unix time.",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        running, waiting = self._names(resident), self._names(cache.waiting)
        family.add_metric([running, waiting, str(max(limit, len(resident), 1))], time.time())
        return family

    def _names(self, digests: Iterable[str]) -> str:
        registry = self._adapters.registry
        return ",".join(sorted({name for digest in digests for name in registry.names_of_weights(digest)}))

    def _cache_config(self) -> Family:
        labels = {"block_size": str(BLOCK_TOKENS), "num_gpu_blocks": str(self._kv_tokens // BLOCK_TOKENS)}
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV memory in blocks.", labels=[*self._labels, *labels]
        )
        family.add_metric([*self._labels.values(), *labels.values()], 1)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Family:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Family:
        family = CounterMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, source: MetricWrapperBase) -> Family:
        """A histogram without labels of its own under another name."""
        family = HistogramMetricFamily(name, text, labels=list(self._labels))
        buckets = [(sample.labels["le"], sample.value) for sample in _samples(source, "_bucket")]
        (total,) = [sample.value for sample in _samples(source, "_sum")]
        family.add_metric(list(self._labels.values()), buckets, total)
        return family


def _samples(metric: MetricWrapperBase, suffix: str) -> Iterator[Sample]:
    for family in metric.collect():
        yield from (sample for sample in family.samples if sample.name.endswith(suffix))


def _total(metric: MetricWrapperBase) -> float:
    """The value of a gauge or counter, over all its labels."""
    return sum(sample.value for family in metric.collect() for sample in family.samples if _is_value(sample.name))


def _is_value(name: str) -> bool:
    return not name.endswith("_created")
