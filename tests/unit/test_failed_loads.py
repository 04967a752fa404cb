"""A load that fails, fails for that adapter and for those who wait for it; the next one is a new try."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server.adapters.adapter_cache import Loaded
from server.adapters.content.manifest import Manifest
from server.adapters.versions import Pin
from server.api.errors import reply_to
from server.errors import AdapterNotLoaded
from tests.adapter_folders import CONFIG, NUM_BYTES, AdapterHarness, make, write


class Failing(AdapterHarness):
    """Whose loads fail as often as ``failures`` says."""

    failures = 0

    async def _load(self, manifest: Manifest) -> Loaded:
        if self.failures:
            self.failures -= 1
            await asyncio.sleep(0.01)
            raise MemoryError
        self.loaded.append(manifest.name)
        return Loaded(1.0, NUM_BYTES // 2)


@pytest.fixture
async def harness(tmp_path: Path) -> Failing:
    harness = Failing(tmp_path, state=True)
    for name in ("a", "b"):
        make(harness.first, name, lora_alpha=ord(name))
    await harness.watcher.scan()
    return harness


async def test_everybody_who_waits_for_a_load_that_fails_is_told_and_the_next_one_loads_it(harness: Failing) -> None:
    harness.failures = 1
    results = await asyncio.gather(*(harness.adapters.acquire("a") for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [AdapterNotLoaded] * 3
    assert harness.cache.num_bytes == harness.metrics.adapter_memory._value.get() == 0
    await harness.use("b")
    await harness.use("a")
    assert harness.loaded == ["b", "a"]
    harness.cache.check_integrity()


def test_an_adapter_that_cannot_be_loaded_is_answered_with_a_503_that_may_be_tried_again() -> None:
    reply = reply_to(AdapterNotLoaded("a"), request_id="r")
    assert (reply.status, reply.body["error"]["code"]) == (503, "adapter_not_loaded")
    assert "'a' could not be loaded" in reply.body["error"]["message"]
    assert int(reply.headers["Retry-After"]) > 0


async def test_a_new_version_that_cannot_be_loaded_ahead_is_loaded_when_it_is_asked_for(harness: Failing) -> None:
    """The folder was refused as one that could not be read, until it changed again."""
    old = await harness.use("a")
    harness.failures = 1
    write(harness.first / "a", config=CONFIG | {"lora_alpha": 16})
    await harness.watcher.scan()
    assert harness.failures == 0 and "a" not in harness.sync.refusals
    assert await harness.use("a") != old


async def test_a_pinned_adapter_that_cannot_be_loaded_is_logged_and_loaded_later(
    harness: Failing, caplog: pytest.LogCaptureFixture
) -> None:
    harness.failures = 1
    harness.adapters.set_pins({"a": Pin(resident=True)})
    async with asyncio.timeout(10):
        while not any("loading the pinned adapter a failed" in record.message for record in caplog.records):
            await asyncio.sleep(0.01)
    assert harness.loaded == []
    harness.adapters.preload()
    async with asyncio.timeout(10):
        while harness.loaded != ["a"]:
            await asyncio.sleep(0.01)


async def test_room_that_was_made_for_a_load_that_failed_is_reported(harness: Failing) -> None:
    await harness.use("b")
    harness.cache.max_bytes = NUM_BYTES
    harness.failures = 1
    with pytest.raises(AdapterNotLoaded):
        await harness.adapters.acquire("a")
    assert harness.cache.num_bytes == harness.metrics.adapter_memory._value.get() == 0


async def test_what_an_adapter_takes_is_told_once_it_was_loaded(harness: Failing) -> None:
    adapter = await harness.adapters.served("a")
    assert harness.adapters.num_bytes(adapter) == NUM_BYTES
    await harness.use("a")
    assert harness.adapters.num_bytes(adapter) == NUM_BYTES // 2 == harness.cache.num_bytes
    assert harness.metrics.adapter_memory._value.get() == NUM_BYTES // 2
