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
from tests.adapter_folders import CONFIG, Shelf, make, tensors, write


@pytest.fixture
async def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


async def test_adapters_there_at_start_are_listed_unread(shelf: Shelf) -> None:
    make(shelf.first, "a")
    await shelf.watcher.start()
    assert shelf.names == ["a"]
    assert shelf.registry.get("a").current is None


async def test_a_folder_counts_when_it_has_settled(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, settle=0.2)
    path = shelf.first / "a"
    path.mkdir()
    write(path, config=CONFIG)
    assert not await shelf.watcher.scan()
    write(path, weights=tensors())
    for _ in range(3):
        assert not await shelf.watcher.scan()
        assert shelf.names == []
    await asyncio.sleep(0.25)
    assert await shelf.watcher.scan()
    assert shelf.names == ["a"]
    assert shelf.metrics.registry.get_sample_value("quickchange_adapter_rejections_total") == 0


async def test_a_file_whose_time_was_set_back_counts_as_changed(tmp_path: Path) -> None:
    """``cp -p`` and ``rsync -t`` give a file its old time before it is whole; the inode's own time tells."""
    shelf = Shelf(tmp_path, settle=0.2)
    path = make(shelf.first, "a")
    for file in path.iterdir():
        os.utime(file, (1, 1))
    os.utime(path, (1, 1))
    await shelf.watcher.scan()
    assert shelf.names == []


async def test_a_start_waits_a_moment_for_what_is_just_being_copied(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, settle=0.2)
    make(shelf.first, "a")
    await shelf.watcher.start()
    assert shelf.names == ["a"]


async def test_a_folder_that_disappears_is_gone(shelf: Shelf) -> None:
    path = make(shelf.first, "a")
    await shelf.watcher.scan()
    await shelf.use("a")
    shutil.rmtree(path)
    await shelf.watcher.scan()
    assert (shelf.names, len(shelf.freed)) == ([], 1)


async def test_a_folder_put_back_within_the_grace_is_an_update(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, grace=60)
    path = make(shelf.first, "a")
    await shelf.watcher.scan()
    before = await shelf.version("a")
    shutil.rmtree(path)
    await shelf.watcher.scan()
    assert shelf.names == ["a"]
    make(shelf.first, "a", lora_alpha=16)
    await shelf.watcher.scan()
    assert await shelf.version("a") != before


async def test_a_broken_folder_is_reported_once_and_disturbs_nobody(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    make(shelf.first, "a")
    make(shelf.first, "b", layer_replication=[[0, 2]])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await shelf.watcher.scan()
    assert shelf.names == ["a"]
    assert len(caplog.records) == 1
    assert "layer_replication" in caplog.text
    assert "layer_replication" in shelf.intake.refusals["b"][1]


async def test_a_mended_folder_is_served(shelf: Shelf) -> None:
    path = make(shelf.first, "a", layer_replication=[[0, 2]])
    await shelf.watcher.scan()
    write(path, config=CONFIG)
    await shelf.watcher.scan()
    assert (shelf.names, shelf.intake.refusals) == (["a"], {})


async def test_an_adapter_replaced_by_a_broken_one_stays(shelf: Shelf) -> None:
    path = make(shelf.first, "a")
    await shelf.watcher.scan()
    label = await shelf.use("a")
    write(path, config=CONFIG | {"layer_replication": [[0, 2]]})
    await shelf.watcher.scan()
    assert await shelf.use("a") == label
    assert "layer_replication" in str(shelf.registry.get("a").refused)


async def test_a_changed_folder_is_loaded_before_its_name_moves(shelf: Shelf) -> None:
    path = make(shelf.first, "a")
    await shelf.watcher.scan()
    old = await shelf.lender.acquire("a")
    write(path, config=CONFIG | {"lora_alpha": 16})
    shelf.gate.clear()
    scanning = asyncio.ensure_future(shelf.watcher.scan())
    await asyncio.sleep(0.1)
    assert await shelf.version("a") == old.adapters[0].adapter.version_digest
    shelf.gate.set()
    await scanning
    assert await shelf.version("a") != old.adapters[0].adapter.version_digest
    assert shelf.loaded == ["a", "a"]
    old.release()


async def test_a_touched_but_equal_folder_is_not_loaded_again(shelf: Shelf) -> None:
    path = make(shelf.first, "a")
    await shelf.watcher.scan()
    await shelf.use("a")
    write(path, config=CONFIG)
    await shelf.watcher.scan()
    await shelf.use("a")
    assert shelf.loaded == ["a"]


async def test_the_first_folder_wins_and_the_second_takes_over(shelf: Shelf) -> None:
    mine = make(shelf.first, "a")
    make(shelf.second, "a", lora_alpha=16)
    await shelf.watcher.scan()
    assert (await shelf.lender.served("a")).path == mine
    shutil.rmtree(mine)
    await shelf.watcher.scan()
    assert (await shelf.lender.served("a")).path == shelf.second / "a"


async def test_a_name_is_not_gone_while_its_successor_is_broken(shelf: Shelf) -> None:
    """A folder that took a demo's name was a 404 until it had settled, and for good where it was broken."""
    make(shelf.second, "a")
    await shelf.watcher.scan()
    label = await shelf.use("a")
    mine = make(shelf.first, "a", layer_replication=[[0, 2]])
    for _ in range(3):
        await shelf.watcher.scan()
        assert await shelf.use("a") == label
    write(mine, config=CONFIG | {"lora_alpha": 16})
    await shelf.watcher.scan()
    assert (await shelf.lender.served("a")).path == mine


async def test_hidden_folders_and_files_are_left_alone_and_a_link_outside_is_refused(shelf: Shelf) -> None:
    """The link was left out without a word, and whoever had put it there looked for the reason."""
    make(shelf.first, ".a.partial")
    (shelf.first / "link").symlink_to(make(shelf.first.parent, "outside"))
    (shelf.first / "README.md").write_text("no adapter")
    (shelf.first / "linked.md").symlink_to("README.md")
    (shelf.first / "dangling").symlink_to("nowhere")
    await shelf.watcher.scan()
    assert (shelf.names, list(shelf.intake.refusals)) == ([], ["link"])
    assert "leads outside the folders that links may lead into" in shelf.intake.refusals["link"][1]


async def test_a_missing_adapter_folder_is_waited_for(shelf: Shelf) -> None:
    shelf.first.rmdir()
    await shelf.watcher.scan()
    shelf.first.mkdir()
    make(shelf.first, "a")
    await shelf.watcher.scan()
    assert shelf.names == ["a"]


async def test_a_fault_in_one_folder_stops_neither_the_others_nor_the_watcher(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only refusals were caught once: any other error ended the look, and at start the server."""
    listing = shelf.reader.listing

    async def explode(path: Path, name: str) -> object:
        if name == "explosive":
            raise MemoryError
        return await listing(path, name)

    monkeypatch.setattr(shelf.reader, "listing", explode)
    make(shelf.first, "explosive")
    make(shelf.first, "good")
    await shelf.watcher.scan()
    assert shelf.names == ["good"]
    assert "could not be read (MemoryError)" in shelf.intake.refusals["explosive"][1]


async def test_events_bring_a_look_forward(tmp_path: Path) -> None:
    """Without them the next look would come after ten seconds."""
    shelf = Shelf(tmp_path, settle=1.0)
    await shelf.watcher.start()
    watching = asyncio.create_task(shelf.watcher.run())
    await asyncio.sleep(0.5)
    make(shelf.first, "a")
    for _ in range(60):
        await asyncio.sleep(0.1)
        if shelf.names:
            break
    watching.cancel()
    assert shelf.names == ["a"]


async def test_without_events_the_folders_are_looked_at_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(self: AdapterWatcher, paths: object) -> None:
        return

    monkeypatch.setattr(AdapterWatcher, "_listen", deaf)
    shelf = Shelf(tmp_path, settle=0.05)
    watching = asyncio.create_task(shelf.watcher.run())
    make(shelf.first, "a")
    for _ in range(100):
        await asyncio.sleep(0.05)
        if shelf.names:
            break
    watching.cancel()
    assert shelf.names == ["a"]


async def test_aliases_follow_their_file_and_a_wrong_file_changes_nothing(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    make(shelf.first, "a")
    (shelf.first / "aliases.toml").write_text('support = "a"\n')
    await shelf.watcher.scan()
    assert await shelf.use("support") == await shelf.use("a")
    (shelf.first / "aliases.toml").write_text("support = [\n")
    await shelf.watcher.scan()
    assert "support" in shelf.lender.aliases
    assert "aliases.toml is not used" in caplog.text
    (shelf.first / "aliases.toml").unlink()
    await shelf.watcher.scan()
    assert shelf.lender.aliases == {}


async def test_no_watch_goes_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recursive watch follows links, so that one to ``/`` had the whole disk watched at start."""
    seen: list[tuple[tuple[Path, ...], bool]] = []

    async def awatch(*paths: Path, recursive: bool, **how: object) -> AsyncIterator[None]:
        seen.append((paths, recursive))
        if paths:
            raise OSError("none here")
        yield

    monkeypatch.setattr("server.adapters.watcher.awatch", awatch)
    shelf = Shelf(tmp_path, settle=0.05)
    make(shelf.first, "a")
    (shelf.first / "root").symlink_to("/")
    await shelf.watcher.start()
    watching = asyncio.create_task(shelf.watcher.run())
    for _ in range(100):
        await asyncio.sleep(0.01)
        if seen:
            break
    watching.cancel()
    assert (set(seen[0][0]), seen[0][1]) == ({shelf.first, shelf.second, shelf.first / "a"}, False)


async def test_events_are_told_of_a_folder_that_took_anothers_place(tmp_path: Path) -> None:
    """A watch belongs to the folder that was there: a change of its successor was seen after ten intervals."""
    shelf = Shelf(tmp_path, settle=0.1)
    path = make(shelf.first, "a")
    await asyncio.sleep(0.12)
    await shelf.watcher.start()
    watching = asyncio.create_task(shelf.watcher.run())
    await asyncio.sleep(0.2)
    path.rename(shelf.first / ".before")
    make(shelf.first, ".made").rename(path)
    await asyncio.sleep(0.5)
    write(path, config=CONFIG | {"lora_alpha": 16})
    try:
        for _ in range(60):
            await asyncio.sleep(0.01)
            if shelf.registry.get("a").listing.config.alpha == 16:
                break
    finally:
        watching.cancel()
    assert shelf.registry.get("a").listing.config.alpha == 16
