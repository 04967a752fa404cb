"""A folder that changes in nothing but its times disturbs no request, and one that is being read again is no 404."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.adapters import adapter_library as library_module
from server.adapters import watcher as watcher_module
from server.adapters.content.manifest import Manifest
from server.adapters.watcher import AdapterWatcher, Found
from server.api.errors import reply_to
from server.errors import AdapterPending, ModelNotFound
from tests.adapter_folders import CONFIG, AdapterHarness, make, write

WEIGHTS_FILE = "adapter_model.safetensors"


def touch(path: Path) -> None:
    os.utime(path / WEIGHTS_FILE)


def rewrite(path: Path) -> None:
    """The same bytes in new files, as a checkout or an rsync without times leaves them."""
    for file in list(path.iterdir()):
        file.with_suffix(".new").write_bytes(file.read_bytes())
        file.with_suffix(".new").replace(file)


HARMLESS: dict[str, Callable[[Path], object]] = {
    "a hard link made": lambda path: os.link(path / WEIGHTS_FILE, path.parent.parent / "link"),
    "touched": touch,
    "mode changed": lambda path: (path / WEIGHTS_FILE).chmod(0o640),
    "rewritten": rewrite,
    "a file more": lambda path: (path / "README.md").write_text("a card"),
    "a checkpoint more": lambda path: (path / "checkpoint-500").mkdir(),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
async def test_a_change_of_nothing_but_times_disturbs_no_request(
    tmp_path: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hard link to a served file moves its ctime: an intact adapter that was not in memory was a 404 until the next
    look, ten seconds a request. No look is taken here at all."""
    monkeypatch.setattr(library_module, "READ_TIMEOUT", 0.0)
    harness = AdapterHarness(tmp_path, room=1)
    path = make(harness.first, "a")
    make(harness.first, "b", lora_alpha=16)
    await harness.watcher.scan()
    label = await harness.use("a")
    await harness.use("b")
    change(path)
    for _ in range(3):
        assert await harness.use("a") == label
        await harness.use("b")
    assert len(harness.loaded) == 8
    await harness.watcher.scan()
    assert await harness.use("a") == label


async def test_a_folder_renamed_away_and_back_within_the_grace_fails_no_request(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, room=1, grace=60)
    path = make(harness.first, "a")
    make(harness.first, "b", lora_alpha=16)
    await harness.watcher.scan()
    label = await harness.use("a")
    await harness.use("b")
    path.rename(harness.first / ".aside")
    await harness.watcher.scan()
    waiting = asyncio.ensure_future(harness.use("a"))
    await asyncio.sleep(0.15)
    (harness.first / ".aside").rename(path)
    assert await waiting == label


async def test_a_stalled_look_makes_no_adapter_wait_for_twenty_times_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that stalled for seconds during a look kept what changed meanwhile out for minutes where the system tells
    of no events: a 404 after ten seconds each time, and no line in the log."""
    look = AdapterWatcher._read_folders
    stalled: list[float] = []

    async def deaf(self: AdapterWatcher, paths: object) -> None:
        return

    def stall_once(self: AdapterWatcher, *arguments: Any) -> dict[str, Found]:
        found = look(self, *arguments)
        if harness.names and not stalled:
            time.sleep(0.3)
            os.link(path / WEIGHTS_FILE, tmp_path / "link")
            stalled.append(time.monotonic())
        return found

    monkeypatch.setattr(AdapterWatcher, "_listen", deaf)
    monkeypatch.setattr(AdapterWatcher, "_read_folders", stall_once)
    caplog.set_level(logging.INFO)
    harness = AdapterHarness(tmp_path, settle=0.1)
    path = make(harness.first, "a")
    await harness.watcher.start()
    watching = asyncio.create_task(harness.watcher.run())
    try:
        while not stalled:
            await asyncio.sleep(0.01)
        assert (await asyncio.wait_for(harness.use("a"), 2)).startswith("a@")
    finally:
        watching.cancel()
    assert "adapter a: the folder changed after it was read; reading the folder again" in caplog.messages


async def test_a_folder_that_a_request_waits_for_is_looked_at_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks at all folders are rare where they take long, and no request waits for the next one."""
    look, looks = AdapterWatcher._read_folders, Counter[bool]()

    async def deaf(self: AdapterWatcher, paths: object) -> None:
        return

    def slow(self: AdapterWatcher, names: Any = None) -> dict[str, Found]:
        looks[names is None] += 1
        time.sleep(0.1 if names is None else 0)
        return look(self, names)

    monkeypatch.setattr(AdapterWatcher, "_listen", deaf)
    monkeypatch.setattr(AdapterWatcher, "_read_folders", slow)
    harness = AdapterHarness(tmp_path, settle=0.02)
    path = make(harness.first, "a")
    await harness.watcher.start()
    watching = asyncio.create_task(harness.watcher.run())
    try:
        await asyncio.sleep(0.3)  # from now on the next look at all folders is two seconds away
        before = looks[True]
        os.link(path / WEIGHTS_FILE, tmp_path / "link")
        assert (await asyncio.wait_for(harness.use("a"), 1)).startswith("a@")
    finally:
        watching.cancel()
    assert (looks[True], looks[False] > 0) == (before, True)


async def test_who_asks_while_a_changed_folder_is_still_to_be_read_is_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "READ_TIMEOUT", 0.0)
    harness = AdapterHarness(tmp_path)
    path = make(harness.first, "a")
    await harness.watcher.scan()
    before = await harness.version("a")
    write(path, config=CONFIG | {"lora_alpha": 16})
    with pytest.raises(AdapterPending) as caught:
        await harness.use("a")
    reply = reply_to(caught.value, request_id="r")
    assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
    assert reply.body["error"]["code"] == "adapter_pending"
    await harness.watcher.scan()
    assert await harness.use("a") != f"a@{before[:12]}"


async def test_a_version_is_not_read_again_for_every_request_while_its_folder_holds_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal sizes look like equal content: only reading tells, and once is enough."""
    monkeypatch.setattr(library_module, "READ_TIMEOUT", 0.0)
    harness = AdapterHarness(tmp_path)
    path = make(harness.first, "a", lora_alpha=16)
    await harness.watcher.scan()
    await harness.version("a")
    read, reads = harness.reader._read, Counter[str]()

    def count(path: Path, name: str) -> Manifest:
        reads[name] += 1
        return read(path, name)

    monkeypatch.setattr(harness.reader, "_read", count)
    write(path, config=CONFIG | {"lora_alpha": 61})
    for _ in range(3):
        with pytest.raises(AdapterPending):
            await harness.use("a")
    assert reads["a"] == 1


async def test_a_look_that_takes_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watcher_module, "_SLOW_SCAN", 0.0)
    make(tmp_path / "first", "a")
    await AdapterHarness(tmp_path).watcher.scan()
    assert [line for line in caplog.messages if line.startswith("scanning 1 adapter folders took ")]


async def test_an_adapter_refused_when_it_is_loaded_is_not_said_to_be_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log said that the previous version is still served, where there was none."""
    harness = AdapterHarness(tmp_path)
    make(harness.first, "unloadable")
    await harness.watcher.scan()
    with pytest.raises(ModelNotFound):
        await harness.use("unloadable")
    assert caplog.messages == ["adapter folder unloadable is not served: no"]


async def test_a_name_pinned_at_a_kept_version_outlives_what_its_folder_becomes(tmp_path: Path) -> None:
    """After a restart the pinned version is in the state directory alone."""
    kept = AdapterHarness(tmp_path, state=True)
    make(kept.first, "a")
    await kept.watcher.scan()
    old = await kept.use("a")
    write(kept.first / "a", config=CONFIG | {"lora_alpha": 16})
    await kept.watcher.scan()
    await kept.use("a")
    await kept.operator.pin("a", old.partition("@")[2])
    again = AdapterHarness(tmp_path, state=True)
    await again.watcher.start()
    entry = again.registry.get("a")
    await again.sync.hash(entry)
    assert entry.served is None
    os.truncate(again.first / "a" / "adapter_model.safetensors", 10)
    await again.watcher.scan()
    assert await again.use("a") == old
