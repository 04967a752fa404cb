"""Prometheus metrics. Label values come from the adapter registry and closed sets, never from a request's text."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

BASE = "base"
COMPOSITION = "_composition"
"""Adapter label of requests with several adapters; no adapter can have this name."""
FINISH_REASONS = ("stop", "length", "tool_calls", "embedding", "cancelled", "failed")
TOKEN_KINDS = ("prompt", "completion")
KEY_LIMITS = ("requests_per_minute", "max_concurrent")
ENGINE_FAILURES = ("step", "command", "accounting", "integrity")

_REQUEST_SECONDS = (*(0.01 * 2**doublings for doublings in range(15)), 655.36)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_PER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LOAD_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ANSWER_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_STEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """All metrics of one server, in their own registry. Requests without an adapter have the adapter label ``base``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counter = partial(Counter, registry=self.registry)
        self._gauge = partial(Gauge, registry=self.registry)
        self._histogram = partial(Histogram, registry=self.registry)
        self.build_info = Info("quickchange_build", "Version of the server.", registry=self.registry)
        self.base_model_info = Info("quickchange_base_model", "The base model in memory.", registry=self.registry)
        self._known: set[str] = set()
        self._keys: frozenset[str] = frozenset()
        self._versions: dict[str, str] = {}
        self._make_request_metrics()
        self._make_kv_metrics()
        self._make_adapter_metrics()
        self._make_engine_metrics()
        self._make_speculation_metrics()
        self.know_adapter(BASE)
        self.know_adapter(COMPOSITION)

    def _make_request_metrics(self) -> None:
        labels = ("adapter",)
        self.requests = self._counter(
            "quickchange_requests", "Generations ended, by adapter and reason.", ("adapter", "finish_reason")
        )
        self.http_errors = self._counter(
            "quickchange_http_errors", "Requests refused or failed, by HTTP status.", ("status",)
        )
        self.key_requests = self._counter(
            "quickchange_key_requests", "Requests accepted, by the label of the API key.", ("key",)
        )
        self.key_tokens = self._counter(
            "quickchange_key_tokens",
            "Tokens of ended requests, by the label of the API key and by kind: prompt, completion.",
            ("key", "kind"),
        )
        self.key_refusals = self._counter(
            "quickchange_key_refusals",
            "Requests refused because of a limit of the API key, by its label and the limit.",
            ("key", "limit"),
        )
        self.ignored_fields = self._counter(
            "quickchange_ignored_fields", "Fields of requests that had no effect, unknown ones included."
        )
        self.client_retries = self._counter(
            "quickchange_client_retries", "Requests that OpenAI's clients sent again, by their own count."
        )
        self.prompt_tokens = self._counter("quickchange_prompt_tokens", "Prompt tokens of ended requests.", labels)
        self.cached_tokens = self._counter(
            "quickchange_prefix_cached_tokens",
            "Prompt tokens whose keys and values were reused from a cached prefix.",
            labels,
        )
        self.generated_tokens = self._counter("quickchange_generated_tokens", "Tokens generated.", labels)
        self.answer_tokens = self._histogram(
            "quickchange_answer_tokens",
            "Tokens of an answer that ended by itself or by its length.",
            labels,
            buckets=_ANSWER_TOKENS,
        )
        self.repetitive_answers = self._counter(
            "quickchange_repetitive_answers", "Answers whose last 64 tokens repeat with a period of 32 or less.", labels
        )
        self.time_to_first_token = self._histogram(
            "quickchange_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self.time_per_output_token = self._histogram(
            "quickchange_time_per_output_token_seconds",
            "Mean time between the tokens of one generation after the first.",
            buckets=_PER_TOKEN_SECONDS,
        )
        self.request_duration = self._histogram(
            "quickchange_request_duration_seconds",
            "Time from a request's arrival to its end.",
            buckets=_REQUEST_SECONDS,
        )

    def _make_kv_metrics(self) -> None:
        self.kv_slots_used = self._gauge("quickchange_kv_slots_used", "KV slots of running sequences.")
        self.kv_slots_cached = self._gauge(
            "quickchange_kv_slots_cached", "Free KV slots that cache the prefix of an ended sequence."
        )
        self.kv_slots = self._gauge("quickchange_kv_slots", "KV slots in total.")
        self.kv_memory = self._gauge(
            "quickchange_kv_memory_bytes",
            "Memory of keys and values: reserved by running sequences, and cached of ended ones.",
        )
        self.kv_memory_used = self._gauge(
            "quickchange_kv_memory_used_bytes", "Memory of keys and values reserved by running sequences."
        )
        self.kv_memory_limit = self._gauge("quickchange_kv_memory_limit_bytes", "Memory that keys and values may take.")

    def _make_adapter_metrics(self) -> None:
        self.adapters_loaded = self._gauge("quickchange_adapters_loaded", "Adapters that can be requested.")
        self.adapter_rejections = self._counter(
            "quickchange_adapter_rejections", "Adapter folders that were refused when read."
        )
        self.adapter_version = self._gauge(
            "quickchange_adapter_info",
            "1 for the current version of each adapter that has been requested.",
            ("adapter", "version"),
        )
        self.adapters_resident = self._gauge("quickchange_adapters_resident", "Adapters whose weights are in memory.")
        self.adapter_memory = self._gauge("quickchange_adapter_memory_bytes", "Memory that adapters' weights take.")
        self.adapter_copies = self._gauge(
            "quickchange_adapter_copies_bytes",
            "Memory of adapters' weights copied for batched computation, within the same limit, or of kernels' tables.",
        )
        self.adapter_memory_limit = self._gauge(
            "quickchange_adapter_memory_limit_bytes", "Memory that adapters' weights and copies may take."
        )
        self.adapter_load_seconds = self._histogram(
            "quickchange_adapter_load_seconds",
            "Time from reading an adapter's file to having its weights in the engine.",
            buckets=_LOAD_SECONDS,
        )

    def _make_engine_metrics(self) -> None:
        self.queued = self._gauge("quickchange_sequences_queued", "Sequences that wait for a KV slot.")
        self.running = self._gauge("quickchange_sequences_running", "Sequences in the batch.")
        self.paused = self._gauge(
            "quickchange_sequences_paused", "Sequences that keep their KV slot while those of another key run."
        )
        self.engine_up = self._gauge("quickchange_engine_up", "1 while the engine thread lives.")
        self.engine_failures = self._counter(
            "quickchange_engine_failures",
            "Failures that the engine thread survived, by kind: step, command, accounting (metrics), integrity check.",
            ("kind",),
        )
        for kind in ENGINE_FAILURES:
            self.engine_failures.labels(kind)
        self.step_duration = self._histogram(
            "quickchange_step_duration_seconds", "Duration of an engine step.", buckets=_STEP_SECONDS
        )
        self.step_rows = self._histogram(
            "quickchange_step_rows", "Rows of the flat forward pass of a step.", buckets=_STEP_ROWS
        )
        self.step_sequences = self._histogram(
            "quickchange_step_sequences", "Sequences in a step.", buckets=_STEP_ROWS[:8]
        )
        self.step_adapters = self._histogram(
            "quickchange_step_adapters",
            "Different adapters in a step; the base without an adapter counts as one.",
            buckets=_STEP_ROWS[:8],
        )

    def _make_speculation_metrics(self) -> None:
        self.draft_tokens = self._counter("quickchange_draft_tokens", "Draft tokens proposed by speculation.")
        self.forced_tokens = self._counter(
            "quickchange_forced_tokens", "Tokens that a grammar forced, without sampling."
        )
        self.accepted_draft_tokens = self._counter(
            "quickchange_accepted_draft_tokens", "Draft tokens accepted by verification."
        )

    def forget_adapter(self, adapter: str) -> None:
        """Remove the series of a deleted adapter; no error if it has none."""
        if adapter not in self._known:
            return
        self._known.discard(adapter)
        self.show_version(adapter, None)
        self.prompt_tokens.remove(adapter)
        self.cached_tokens.remove(adapter)
        self.generated_tokens.remove(adapter)
        self.answer_tokens.remove(adapter)
        self.repetitive_answers.remove(adapter)
        for reason in FINISH_REASONS:
            self.requests.remove(adapter, reason)

    def show_version(self, adapter: str, version: str | None) -> None:
        """Set the current version of an adapter that has series; None removes it."""
        previous = self._versions.pop(adapter, None)
        if previous is not None:
            self.adapter_version.remove(adapter, previous)
        if version is not None and adapter in self._known:
            self._versions[adapter] = version
            self.adapter_version.labels(adapter, version).set(1)

    def set_keys(self, keys: Collection[str]) -> None:
        """Create the series of API keys, by their labels, at zero, and remove those of keys that are gone."""
        for key in self._keys.difference(keys):
            self.key_requests.remove(key)
            for kind in TOKEN_KINDS:
                self.key_tokens.remove(key, kind)
            for limit in KEY_LIMITS:
                self.key_refusals.remove(key, limit)
        for key in keys:
            self.key_requests.labels(key)
            for kind in TOKEN_KINDS:
                self.key_tokens.labels(key, kind)
            for limit in KEY_LIMITS:
                self.key_refusals.labels(key, limit)
        self._keys = frozenset(keys)

    def know_adapter(self, adapter: str) -> None:
        """Create the series of an adapter at zero, so that rates are right from its first request."""
        if adapter in self._known:
            return
        self._known.add(adapter)
        self.prompt_tokens.labels(adapter)
        self.cached_tokens.labels(adapter)
        self.generated_tokens.labels(adapter)
        self.answer_tokens.labels(adapter)
        self.repetitive_answers.labels(adapter)
        for reason in FINISH_REASONS:
            self.requests.labels(adapter, reason)
