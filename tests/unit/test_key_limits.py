"""Limits of a key: requests per minute and at the same time; wrong keys are slowed, right ones never."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest

from server.api.app import create_app
from server.api.auth.access import Access
from server.api.auth.key_limits import KeyLimits
from server.api.auth.keys import ApiKey, KeyRing, digest_of, single_key
from server.api.auth.principal import AccessScope, Principal
from server.api.auth.wrong_keys import FREE, MAX_ADDRESSES, MAX_DELAY, WrongKeys
from server.api.state import ServerState
from server.errors import ConcurrencyLimitExceeded, QueueShareFull, RateLimitExceeded, TooManyWrongKeys
from tests.fakes import BASE, FakeEngine, Script, ask, server_state

KEY = "a-key-with-limits"
BEARER = {"authorization": f"Bearer {KEY}"}
ONE = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def principal(*, max_concurrent: int | None = None, requests_per_minute: int | None = None) -> Principal:
    return Principal("key:a", "a", frozenset({AccessScope.INFER}), None, max_concurrent, requests_per_minute)


def state_with(access: Access, engine: FakeEngine | None = None) -> ServerState:
    return replace(server_state(engine or FakeEngine()), access=access)


def access_for(limited: Principal, clock: Clock | None = None) -> Access:
    keys = KeyRing((ApiKey(digest_of(KEY), limited),), is_open=False)
    return Access(keys, limits=KeyLimits(clock or Clock()), wrong_keys=WrongKeys(clock or Clock()))


def test_a_bucket_holds_a_minute_and_fills_steadily() -> None:
    clock, limited = Clock(), principal(requests_per_minute=6)
    limits = KeyLimits(clock)
    for _ in range(6):
        limits.begin(limited)
    with pytest.raises(RateLimitExceeded) as caught:
        limits.begin(limited)
    assert caught.value.retry_after == pytest.approx(10)
    clock.now += 10
    limits.begin(limited)
    clock.now += 3600
    for _ in range(6):
        limits.begin(limited)
    with pytest.raises(RateLimitExceeded):
        limits.begin(limited)


def test_requests_at_a_time_are_counted_until_they_end_and_a_refused_one_takes_no_token() -> None:
    limited = principal(max_concurrent=2, requests_per_minute=3)
    limits = KeyLimits(Clock())
    limits.begin(limited)
    limits.begin(limited)
    for _ in range(5):
        with pytest.raises(ConcurrencyLimitExceeded):
            limits.begin(limited)
    limits.end(limited)
    limits.begin(limited)


def test_a_reload_keeps_the_counts_of_keys_that_stay_and_of_running_requests() -> None:
    limited = principal(max_concurrent=1, requests_per_minute=1)
    limits = KeyLimits(Clock())
    limits.begin(limited)
    limits.forget_idle(frozenset())
    limits.end(limited)
    limits.forget_idle(frozenset({limited.id}))
    with pytest.raises(RateLimitExceeded):
        limits.begin(limited)
    limits.forget_idle(frozenset())
    limits.begin(limited)


def test_over_the_rate_a_request_is_a_429_that_says_when() -> None:
    state = state_with(access_for(principal(requests_per_minute=2)))
    app = create_app(state)
    statuses = [ask(app, "POST", "/v1/chat/completions", json=ONE, headers=BEARER) for _ in range(3)]
    assert [response.status_code for response in statuses] == [200, 200, 429]
    error = statuses[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert statuses[-1].headers["retry-after"] == "30"
    assert ask(app, "GET", "/health", headers=BEARER).status_code == 200
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in (state.metrics.key_requests, state.metrics.key_refusals)
        for family in metric.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    assert samples == {
        ("quickchange_key_requests_total", "a"): 2,
        ("quickchange_key_refusals_total", "a", "requests_per_minute"): 1,
        ("quickchange_key_refusals_total", "a", "max_concurrent"): 0,
    }


@pytest.mark.parametrize("stream", [True, False])
async def test_a_running_answer_counts_until_it_ends(stream: bool) -> None:
    engine = FakeEngine([Script(delay=0.05)])
    app = create_app(state_with(access_for(principal(max_concurrent=1)), engine))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=BEARER) as client:

        async def post() -> int:
            return (await client.post("/v1/chat/completions", json={**ONE, "stream": stream})).status_code

        assert sorted(await asyncio.gather(post(), post())) == [200, 429]
        assert await post() == 200


def test_wrong_keys_of_an_address_are_slowed_and_others_are_not() -> None:
    clock = Clock()
    wrong = WrongKeys(clock)
    delays = [wrong.delay("10.0.0.1") for _ in range(FREE + int(MAX_DELAY))]
    assert delays == [0.0] * FREE + [1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(TooManyWrongKeys) as caught:
        wrong.delay("10.0.0.1")
    assert caught.value.retry_after == pytest.approx(MAX_DELAY + 1)
    assert wrong.delay("10.0.0.2") == 0
    clock.now += 3600
    assert wrong.delay("10.0.0.1") == 0


def test_addresses_of_one_ipv6_network_count_together() -> None:
    wrong = WrongKeys(Clock())
    for number in range(FREE):
        assert wrong.delay(f"2001:db8::{number:x}") == 0
    assert wrong.delay("2001:db8::ffff") == 1
    assert wrong.delay("2001:db8:0:1::1") == 0


def test_ipv4_clients_of_a_server_on_both_families_do_not_count_together() -> None:
    """On ``--host ::`` their addresses are of one IPv6 network."""
    wrong = WrongKeys(Clock())
    delays = [wrong.delay("::ffff:10.0.0.1") for _ in range(FREE + 1)]
    assert delays[-1] == 1
    assert wrong.delay("::ffff:10.0.0.2") == 0
    assert wrong.delay("10.0.0.1") == 2


def test_the_table_of_addresses_is_bounded() -> None:
    wrong = WrongKeys(Clock())
    for number in range(2 * MAX_ADDRESSES):
        wrong.delay(f"10.0.{number // 256}.{number % 256}")
    assert len(wrong._through) == MAX_ADDRESSES


def test_a_right_key_is_answered_at_once_while_wrong_ones_from_its_address_wait() -> None:
    app = create_app(state_with(access_for(principal())))
    wrong: Any = {"authorization": "Bearer wrong"}
    statuses = [ask(app, "GET", "/v1/models", headers=wrong).status_code for _ in range(FREE)]
    assert statuses == [401] * FREE
    since = time.perf_counter()
    assert ask(app, "GET", "/v1/models", headers=BEARER).status_code == 200
    assert ask(app, "GET", "/v1/models").status_code == 401
    assert time.perf_counter() - since < 0.5
    since = time.perf_counter()
    assert ask(app, "GET", "/v1/models", headers=wrong).status_code == 401
    assert time.perf_counter() - since >= 0.99


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", ONE), ("/v1/embeddings", {"model": BASE, "input": ["a", "b"]})],
)
def test_a_key_with_its_share_of_the_queue_gets_a_429(path: str, body: dict[str, Any]) -> None:
    """Embeddings were not counted: one key could fill the queue with them."""

    class FullShare(FakeEngine):
        def check_capacity(self, num_sequences: int, *, owner: str | None = None) -> None:
            if owner is not None:
                raise QueueShareFull(4, retry_after=3)

    app = create_app(state_with(access_for(principal()), FullShare()))
    response = ask(app, "POST", path, json=body, headers=BEARER)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert response.headers["retry-after"] == "3"
    assert ask(create_app(server_state(FullShare())), "POST", path, json=body).status_code == 200, "without keys"


def test_keys_have_their_series_from_the_start_and_removed_ones_have_none() -> None:
    """A rate was wrong from a key's first request, and the series of a removed key stayed."""
    access = access_for(principal(requests_per_minute=2))
    state = state_with(access)
    ask(create_app(state), "GET", "/health")

    def labels() -> set[str]:
        text = generate_latest(state.metrics.registry).decode()
        return set(re.findall(r'^quickchange_key_\w+_total{key="(\w+)"', text, re.MULTILINE))

    assert labels() == {principal().label}
    access.replace_keys(KeyRing((single_key("another-key-of-a-client"),), is_open=False))
    assert labels() == {"api_key"}
