"""What happens to a folder happens to its name, and to nobody else."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.adapters.watcher import AdapterWatcher
from tests.adapter_folders import CONFIG, AdapterHarness, make, tensors, write


@pytest.fixture
async def harness(tmp_path: Path) -> AdapterHarness:
    return AdapterHarness(tmp_path)


async def test_adapters_there_at_start_are_listed_unread(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.start()
    assert harness.names == ["a"]
    assert harness.registry.get("a").current is None


async def test_a_folder_counts_when_it_has_settled(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, settle=0.6)
    path = harness.first / "a"
    path.mkdir()
    write(path, config=CONFIG)
    assert not await harness.watcher.scan()
    write(path, weights=tensors())
    for _ in range(3):
        assert not await harness.watcher.scan()
        assert harness.names == []
    await asyncio.sleep(0.65)
    assert await harness.watcher.scan()
    assert harness.names == ["a"]
    assert harness.metrics.registry.get_sample_value("quickchange_adapter_rejections_total") == 0


async def test_a_file_whose_time_was_set_back_counts_as_changed(tmp_path: Path) -> None:
    """``cp -p`` and ``rsync -t`` give a file its old time before it is whole; the inode's own time tells."""
    harness = AdapterHarness(tmp_path, settle=0.2)
    path = make(harness.first, "a")
    for file in path.iterdir():
        os.utime(file, (1, 1))
    os.utime(path, (1, 1))
    await harness.watcher.scan()
    assert harness.names == []


async def test_a_start_waits_a_moment_for_what_is_just_being_copied(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, settle=0.2)
    make(harness.first, "a")
    await harness.watcher.start()
    assert harness.names == ["a"]


async def test_a_folder_that_disappears_is_gone(harness: AdapterHarness) -> None:
    path = make(harness.first, "a")
    await harness.watcher.scan()
    await harness.use("a")
    shutil.rmtree(path)
    await harness.watcher.scan()
    assert (harness.names, len(harness.freed)) == ([], 1)


async def test_a_folder_put_back_within_the_grace_is_an_update(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, grace=60)
    path = make(harness.first, "a")
    await harness.watcher.scan()
    before = await harness.version("a")
    shutil.rmtree(path)
    await harness.watcher.scan()
    assert harness.names == ["a"]
    make(harness.first, "a", lora_alpha=16)
    await harness.watcher.scan()
    assert await harness.version("a") != before


async def test_a_broken_folder_is_reported_once_and_disturbs_nobody(
    harness: AdapterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    make(harness.first, "a")
    make(harness.first, "b", layer_replication=[[0, 2]])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await harness.watcher.scan()
    assert harness.names == ["a"]
    assert len(caplog.records) == 1
    assert "layer_replication" in caplog.text
    assert "layer_replication" in harness.sync.refusals["b"][1]


async def test_a_mended_folder_is_served(harness: AdapterHarness) -> None:
    path = make(harness.first, "a", layer_replication=[[0, 2]])
    await harness.watcher.scan()
    write(path, config=CONFIG)
    await harness.watcher.scan()
    assert (harness.names, harness.sync.refusals) == (["a"], {})


async def test_an_adapter_replaced_by_a_broken_one_stays(harness: AdapterHarness) -> None:
    path = make(harness.first, "a")
    await harness.watcher.scan()
    label = await harness.use("a")
    write(path, config=CONFIG | {"layer_replication": [[0, 2]]})
    await harness.watcher.scan()
    assert await harness.use("a") == label
    assert "layer_replication" in str(harness.registry.get("a").refused)


async def test_a_changed_folder_is_loaded_before_its_name_moves(harness: AdapterHarness) -> None:
    path = make(harness.first, "a")
    await harness.watcher.scan()
    old = await harness.adapters.acquire("a")
    write(path, config=CONFIG | {"lora_alpha": 16})
    harness.gate.clear()
    scanning = asyncio.ensure_future(harness.watcher.scan())
    await asyncio.sleep(0.1)
    assert await harness.version("a") == old.adapters[0].adapter.version_digest
    harness.gate.set()
    await scanning
    assert await harness.version("a") != old.adapters[0].adapter.version_digest
    assert harness.loaded == ["a", "a"]
    old.release()


async def test_a_touched_but_equal_folder_is_not_loaded_again(harness: AdapterHarness) -> None:
    path = make(harness.first, "a")
    await harness.watcher.scan()
    await harness.use("a")
    write(path, config=CONFIG)
    await harness.watcher.scan()
    await harness.use("a")
    assert harness.loaded == ["a"]


async def test_the_first_folder_wins_and_the_second_takes_over(harness: AdapterHarness) -> None:
    mine = make(harness.first, "a")
    make(harness.second, "a", lora_alpha=16)
    await harness.watcher.scan()
    assert (await harness.adapters.served("a")).listing.path == mine
    shutil.rmtree(mine)
    await harness.watcher.scan()
    assert (await harness.adapters.served("a")).listing.path == harness.second / "a"


async def test_a_name_is_not_gone_while_its_successor_is_broken(harness: AdapterHarness) -> None:
    """A folder that took a demo's name was a 404 until it had settled, and for good where it was broken."""
    make(harness.second, "a")
    await harness.watcher.scan()
    label = await harness.use("a")
    mine = make(harness.first, "a", layer_replication=[[0, 2]])
    for _ in range(3):
        await harness.watcher.scan()
        assert await harness.use("a") == label
    write(mine, config=CONFIG | {"lora_alpha": 16})
    await harness.watcher.scan()
    assert (await harness.adapters.served("a")).listing.path == mine


async def test_hidden_folders_and_files_are_left_alone_and_a_link_outside_is_refused(harness: AdapterHarness) -> None:
    """The link was left out without a word, and whoever had put it there looked for the reason."""
    make(harness.first, ".a.partial")
    (harness.first / "link").symlink_to(make(harness.first.parent, "outside"))
    (harness.first / "README.md").write_text("no adapter")
    (harness.first / "linked.md").symlink_to("README.md")
    (harness.first / "dangling").symlink_to("nowhere")
    await harness.watcher.scan()
    assert (harness.names, list(harness.sync.refusals)) == ([], ["link"])
    assert "leads outside the folders that links may lead into" in harness.sync.refusals["link"][1]


async def test_a_missing_adapter_folder_is_waited_for(harness: AdapterHarness) -> None:
    harness.first.rmdir()
    await harness.watcher.scan()
    harness.first.mkdir()
    make(harness.first, "a")
    await harness.watcher.scan()
    assert harness.names == ["a"]


async def test_a_fault_in_one_folder_stops_neither_the_others_nor_the_watcher(
    harness: AdapterHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only refusals were caught once: any other error ended the look, and at start the server."""
    listing = harness.reader.listing

    async def explode(path: Path, name: str) -> object:
        if name == "explosive":
            raise MemoryError
        return await listing(path, name)

    monkeypatch.setattr(harness.reader, "listing", explode)
    make(harness.first, "explosive")
    make(harness.first, "good")
    await harness.watcher.scan()
    assert harness.names == ["good"]
    assert "reading the folder failed (MemoryError)" in harness.sync.refusals["explosive"][1]


async def test_events_bring_a_look_forward(tmp_path: Path) -> None:
    """Without them the next look would come after ten seconds."""
    harness = AdapterHarness(tmp_path, settle=1.0)
    await harness.watcher.start()
    watching = asyncio.create_task(harness.watcher.run())
    await asyncio.sleep(0.5)
    make(harness.first, "a")
    for _ in range(60):
        await asyncio.sleep(0.1)
        if harness.names:
            break
    watching.cancel()
    assert harness.names == ["a"]


async def test_without_events_the_folders_are_looked_at_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(self: AdapterWatcher, paths: object) -> None:
        return

    monkeypatch.setattr(AdapterWatcher, "_listen", deaf)
    harness = AdapterHarness(tmp_path, settle=0.05)
    watching = asyncio.create_task(harness.watcher.run())
    make(harness.first, "a")
    for _ in range(100):
        await asyncio.sleep(0.05)
        if harness.names:
            break
    watching.cancel()
    assert harness.names == ["a"]


async def test_aliases_follow_their_file_and_a_wrong_file_changes_nothing(
    harness: AdapterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    make(harness.first, "a")
    (harness.first / "aliases.toml").write_text('support = "a"\n')
    await harness.watcher.scan()
    assert await harness.use("support") == await harness.use("a")
    (harness.first / "aliases.toml").write_text("support = [\n")
    await harness.watcher.scan()
    assert "support" in harness.adapters.names.aliases
    assert "aliases.toml is not used" in caplog.text
    (harness.first / "aliases.toml").unlink()
    await harness.watcher.scan()
    assert harness.adapters.names.aliases == {}


async def test_no_watch_goes_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recursive watch follows links, so that one to ``/`` had the whole disk watched at start."""
    seen: list[tuple[tuple[Path, ...], bool]] = []

    async def awatch(*paths: Path, recursive: bool, **how: object) -> AsyncIterator[None]:
        seen.append((paths, recursive))
        if paths:
            raise OSError("none here")
        yield

    monkeypatch.setattr("server.adapters.watcher.awatch", awatch)
    harness = AdapterHarness(tmp_path, settle=0.05)
    make(harness.first, "a")
    (harness.first / "root").symlink_to("/")
    await harness.watcher.start()
    watching = asyncio.create_task(harness.watcher.run())
    for _ in range(100):
        await asyncio.sleep(0.01)
        if seen:
            break
    watching.cancel()
    assert (set(seen[0][0]), seen[0][1]) == ({harness.first, harness.second, harness.first / "a"}, False)


async def test_events_are_told_of_a_folder_that_took_anothers_place(tmp_path: Path) -> None:
    """A watch belongs to the folder that was there: a change of its successor was seen after ten intervals."""
    harness = AdapterHarness(tmp_path, settle=0.1)
    path = make(harness.first, "a")
    await asyncio.sleep(0.12)
    await harness.watcher.start()
    watching = asyncio.create_task(harness.watcher.run())
    await asyncio.sleep(0.2)
    path.rename(harness.first / ".before")
    make(harness.first, ".made").rename(path)
    await asyncio.sleep(0.5)
    write(path, config=CONFIG | {"lora_alpha": 16})
    try:
        for _ in range(60):
            await asyncio.sleep(0.01)
            if harness.registry.get("a").listing.config.alpha == 16:
                break
    finally:
        watching.cancel()
    assert harness.registry.get("a").listing.config.alpha == 16
