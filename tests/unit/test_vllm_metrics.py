"""``--metrics-alias vllm``: what reads vLLM's metrics reads ours, by the rules of the programs that do."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.api.app import create_app
from server.api.state import ServerState
from server.api.vllm_metrics import BLOCK_TOKENS, VllmMetrics
from tests.fakes import BASE, FakeEngine, Script, adapter, ask, server_state

KV_TOKENS = 4096
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def state() -> ServerState:
    """A server with two adapters that answered three requests."""
    scripts = [Script("the cat"), Script("a long answer", then="length"), Script("x", then="fail")]
    state = server_state(FakeEngine(scripts), adapter("poet"), adapter("clerk"), adapter("unused"))
    state.metrics.registry.register(
        VllmMetrics(state.metrics, state.adapters, model_name=state.base_name, kv_tokens=KV_TOKENS)
    )
    app = create_app(state)
    for model in ("poet", "clerk", BASE):
        ask(app, "POST", "/v1/chat/completions", json={**CHAT, "model": model})
    state.metrics.queued.set(3)
    state.metrics.running.set(2)
    state.metrics.kv_memory_limit.set(1000)
    state.metrics.kv_memory_used.set(250)
    return state


def scrape(state: ServerState) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Labels and values of every sample, by its name."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(generate_latest(state.metrics.registry).decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


@dataclass
class PodMetrics:
    """What the endpoint picker of an inference gateway knows of a server."""

    waiting: int
    running: int
    kv_usage: float
    active_adapters: set[str]
    waiting_adapters: set[str]
    max_adapters: int
    block_size: int
    num_blocks: int


def picked_up(samples: dict[str, list[tuple[dict[str, str], float]]]) -> PodMetrics:
    """The picker's rules: a missing family is an error; of the adapters' series, the one with the highest value."""
    labels, _ = max(samples["vllm:lora_requests_info"], key=lambda sample: sample[1])
    cache, _ = samples["vllm:cache_config_info"][0]
    return PodMetrics(
        waiting=int(samples["vllm:num_requests_waiting"][0][1]),
        running=int(samples["vllm:num_requests_running"][0][1]),
        kv_usage=samples["vllm:kv_cache_usage_perc"][0][1],
        active_adapters={name for name in labels["running_lora_adapters"].split(",") if name},
        waiting_adapters={name for name in labels["waiting_lora_adapters"].split(",") if name},
        max_adapters=int(labels["max_lora"]),
        block_size=int(cache["block_size"]),
        num_blocks=int(cache["num_gpu_blocks"]),
    )


def test_an_inference_gateway_reads_queue_cache_and_adapters(state: ServerState) -> None:
    found = picked_up(scrape(state))
    assert (found.waiting, found.running, found.kv_usage) == (3, 2, 0.25)
    assert (found.active_adapters, found.waiting_adapters) == ({"poet", "clerk"}, set())
    assert found.max_adapters == 1000, "the memory of the fake cache over the size of its adapters"
    assert (found.block_size, found.num_blocks) == (BLOCK_TOKENS, KV_TOKENS // BLOCK_TOKENS)


def test_there_is_one_series_of_adapters_and_its_value_is_the_time(state: ServerState) -> None:
    scrape(state)
    ((_, value),) = scrape(state)["vllm:lora_requests_info"]
    assert value == pytest.approx(time.time(), abs=60)


def test_a_server_without_adapters_in_memory_is_read_as_well() -> None:
    state = server_state(FakeEngine(), adapter("poet"))
    aliases = VllmMetrics(state.metrics, state.adapters, model_name=BASE, kv_tokens=KV_TOKENS)
    state.metrics.registry.register(aliases)
    found = picked_up(scrape(state))
    assert (found.active_adapters, found.max_adapters, found.kv_usage) == (set(), 1, 0)


def test_the_router_of_vllms_production_stack_reads_the_former_names(state: ServerState) -> None:
    """It takes the last sample of each of these names, and divides hits by queries."""
    state.metrics.cached_tokens.labels("poet").inc(5)
    samples = scrape(state)
    hits, queries, usage = (
        samples[f"vllm:gpu_{name}"][-1][1]
        for name in ("prefix_cache_hits_total", "prefix_cache_queries_total", "cache_usage_perc")
    )
    assert (hits, usage) == (5, 0.25)
    assert queries == samples["vllm:prompt_tokens_total"][0][1] > 0


def test_counts_and_times_are_those_of_our_own_metrics(state: ServerState) -> None:
    samples = scrape(state)
    reasons = {labels["finished_reason"]: value for labels, value in samples["vllm:request_success_total"]}
    assert reasons == {"stop": 1, "length": 1, "abort": 0}
    own = sum(value for _, value in samples["quickchange_generated_tokens_total"])
    assert samples["vllm:generation_tokens_total"][0][1] == own > 0
    for name, own_name in (
        ("vllm:time_to_first_token_seconds", "quickchange_time_to_first_token_seconds"),
        ("vllm:request_time_per_output_token_seconds", "quickchange_time_per_output_token_seconds"),
        ("vllm:e2e_request_latency_seconds", "quickchange_request_duration_seconds"),
    ):
        buckets = [(labels["le"], value) for labels, value in samples[f"{name}_bucket"]]
        assert buckets == [(labels["le"], value) for labels, value in samples[f"{own_name}_bucket"]]
        for part in ("count", "sum"):
            assert samples[f"{name}_{part}"][0][1] == samples[f"{own_name}_{part}"][0][1]
    assert all(labels["model_name"] == BASE for labels, _ in samples["vllm:num_requests_running"])


def test_without_the_setting_no_name_is_vllms() -> None:
    assert not [name for name in scrape(server_state(FakeEngine())) if name.startswith("vllm:")]
