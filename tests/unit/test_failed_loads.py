"""A load that fails, fails for that adapter and for those who wait for it; the next one is a new try."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server.adapters.content.manifest import Manifest
from server.adapters.leases import Loaded
from server.adapters.versions import Pin
from server.api.errors import reply_to
from server.errors import AdapterNotLoaded
from tests.adapter_folders import CONFIG, NUM_BYTES, Shelf, make, write


class Failing(Shelf):
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
async def shelf(tmp_path: Path) -> Failing:
    shelf = Failing(tmp_path, state=True)
    for name in ("a", "b"):
        make(shelf.first, name, lora_alpha=ord(name))
    await shelf.watcher.scan()
    return shelf


async def test_everybody_who_waits_for_a_load_that_fails_is_told_and_the_next_one_loads_it(shelf: Failing) -> None:
    shelf.failures = 1
    results = await asyncio.gather(*(shelf.lender.acquire("a") for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [AdapterNotLoaded] * 3
    assert shelf.cache.num_bytes == shelf.metrics.adapter_memory._value.get() == 0
    await shelf.use("b")
    await shelf.use("a")
    assert shelf.loaded == ["b", "a"]
    shelf.cache.check_integrity()


def test_an_adapter_that_cannot_be_loaded_is_answered_with_a_503_that_may_be_tried_again() -> None:
    reply = reply_to(AdapterNotLoaded("a"), request_id="r")
    assert (reply.status, reply.body["error"]["code"]) == (503, "adapter_not_loaded")
    assert "'a' could not be loaded" in reply.body["error"]["message"]
    assert int(reply.headers["Retry-After"]) > 0


async def test_a_new_version_that_cannot_be_loaded_ahead_is_loaded_when_it_is_asked_for(shelf: Failing) -> None:
    """The folder was refused as one that could not be read, until it changed again."""
    old = await shelf.use("a")
    shelf.failures = 1
    write(shelf.first / "a", config=CONFIG | {"lora_alpha": 16})
    await shelf.watcher.scan()
    assert shelf.failures == 0 and "a" not in shelf.intake.refusals
    assert await shelf.use("a") != old


async def test_a_pinned_adapter_that_cannot_be_loaded_is_logged_and_loaded_later(
    shelf: Failing, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.failures = 1
    shelf.lender.set_pins({"a": Pin(resident=True)})
    await asyncio.sleep(0.1)
    assert any("the pinned adapter a is not in memory" in record.message for record in caplog.records)
    shelf.lender.preload()
    await asyncio.sleep(0.05)
    assert shelf.loaded == ["a"]


async def test_room_that_was_made_for_a_load_that_failed_is_reported(shelf: Failing) -> None:
    await shelf.use("b")
    shelf.cache.max_bytes = NUM_BYTES
    shelf.failures = 1
    with pytest.raises(AdapterNotLoaded):
        await shelf.lender.acquire("a")
    assert shelf.cache.num_bytes == shelf.metrics.adapter_memory._value.get() == 0


async def test_what_an_adapter_takes_is_told_once_it_was_loaded(shelf: Failing) -> None:
    adapter = await shelf.lender.served("a")
    assert shelf.lender.num_bytes(adapter) == NUM_BYTES
    await shelf.use("a")
    assert shelf.lender.num_bytes(adapter) == NUM_BYTES // 2 == shelf.cache.num_bytes
    assert shelf.metrics.adapter_memory._value.get() == NUM_BYTES // 2
