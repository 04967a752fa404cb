"""What an operator does to a running server's adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from server.adapters.versions import Pin
from server.errors import AdapterRejected, InvalidRequest, ModelNotFound
from tests.adapter_folders import CONFIG, Shelf, make, write


@pytest.fixture
async def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path, state=True)


async def test_load_serves_a_folder_under_another_name_and_has_it_in_memory(shelf: Shelf) -> None:
    make(shelf.first / "archive", "a")
    adapter = await shelf.operator.load("b", "archive/a", in_place=False)
    assert (adapter.name, shelf.loaded, shelf.names) == ("b", ["b"], ["b"])
    await shelf.watcher.scan()
    assert "b" in shelf.names


async def test_load_refuses_a_name_that_is_taken_unless_in_place(shelf: Shelf) -> None:
    make(shelf.first, "a")
    make(shelf.first / "archive", "other", lora_alpha=16)
    before = (await shelf.operator.load("a", "a", in_place=True)).version_digest
    with pytest.raises(InvalidRequest, match="load_inplace"):
        await shelf.operator.load("a", "archive/other", in_place=False)
    assert (await shelf.operator.load("a", "archive/other", in_place=True)).version_digest != before


@pytest.mark.parametrize(
    "path", ["../outside", "/etc", "a/../../outside", "", ".", ".hidden", "link", "link/x", "a\0b", "missing", "a/."]
)
async def test_load_takes_no_path_outside_the_adapter_folder(shelf: Shelf, path: str) -> None:
    outside = make(shelf.first.parent, "outside")
    make(shelf.first, ".hidden")
    (shelf.first / "link").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="lora_path"):
        await shelf.operator.load("x", path, in_place=False)
    assert shelf.names == []


async def test_load_tells_why_a_folder_is_refused(shelf: Shelf) -> None:
    make(shelf.first, "a", layer_replication=[[0, 2]])
    with pytest.raises(AdapterRejected, match="layer_replication"):
        await shelf.operator.load("a", "a", in_place=False)


async def test_an_unloaded_adapter_stays_away_until_its_folder_changes(shelf: Shelf) -> None:
    make(shelf.first, "a")
    await shelf.watcher.scan()
    await shelf.use("a")
    await shelf.operator.unload("a")
    await shelf.watcher.scan()
    assert shelf.names == []
    assert len(shelf.freed) == 1
    write(shelf.first / "a", config=CONFIG | {"lora_alpha": 16})
    await shelf.watcher.scan()
    assert shelf.names == ["a"]
    with pytest.raises(ModelNotFound):
        await shelf.operator.unload("ghost")


async def test_an_unloaded_adapter_can_be_loaded_again(shelf: Shelf) -> None:
    make(shelf.first, "a")
    await shelf.watcher.scan()
    await shelf.operator.unload("a")
    await shelf.operator.load("a", str(shelf.first / "a"), in_place=False)
    assert shelf.names == ["a"]


async def test_delete_removes_folder_versions_and_pin(shelf: Shelf) -> None:
    path = make(shelf.first, "a")
    await shelf.watcher.scan()
    label = await shelf.use("a")
    await shelf.operator.pin("a", None)
    await shelf.operator.delete("a")
    assert (path.exists(), shelf.names, list(shelf.first.iterdir())) == (False, [], [])
    with pytest.raises(ModelNotFound):
        await shelf.use(label)
    assert shelf.store is not None
    assert shelf.store.pins() == {}


async def test_delete_leaves_the_demo_adapters_alone(shelf: Shelf) -> None:
    path = make(shelf.second, "a")
    await shelf.watcher.scan()
    with pytest.raises(InvalidRequest, match="unload it"):
        await shelf.operator.delete("a")
    assert path.exists()


async def test_rollback_goes_back_version_by_version_and_unpin_returns(shelf: Shelf) -> None:
    make(shelf.first, "a")
    await shelf.watcher.scan()
    labels = [await shelf.use("a")]
    for alpha in (16, 32):
        write(shelf.first / "a", config=CONFIG | {"lora_alpha": alpha})
        await shelf.watcher.scan()
        labels.append(await shelf.use("a"))
    assert (await shelf.operator.rollback("a")).label == labels[1]
    assert await shelf.use("a") == labels[1]
    assert (await shelf.operator.rollback("a")).label == labels[0]
    with pytest.raises(InvalidRequest, match="no version of 'a' before"):
        await shelf.operator.rollback("a")
    await shelf.operator.unpin("a")
    assert await shelf.use("a") == labels[2]


async def test_a_pinned_name_does_not_move_when_its_folder_changes_or_goes_back(shelf: Shelf) -> None:
    make(shelf.first, "a")
    await shelf.watcher.scan()
    label = await shelf.use("a")
    await shelf.operator.pin("a", label.partition("@")[2])
    write(shelf.first / "a", config=CONFIG | {"lora_alpha": 16})
    await shelf.watcher.scan()
    assert await shelf.use("a") == label
    shutil.rmtree(shelf.first / "a")
    await shelf.watcher.scan()
    assert shelf.names == []


async def test_pin_refuses_a_version_that_is_not_kept(shelf: Shelf) -> None:
    make(shelf.first, "a")
    await shelf.watcher.scan()
    with pytest.raises(ModelNotFound):
        await shelf.operator.pin("a", "0000")


@pytest.mark.parametrize("state", [False, True])
async def test_a_deleted_names_pin_does_not_wait_for_its_next_folder(tmp_path: Path, state: bool) -> None:
    shelf = Shelf(tmp_path, state=state)
    make(shelf.first, "a")
    await shelf.watcher.scan()
    await shelf.operator.pin("a", (await shelf.use("a")).partition("@")[2])
    await shelf.operator.delete("a")
    make(shelf.first, "a", lora_alpha=16)
    await shelf.watcher.scan()
    assert (await shelf.use("a")).startswith("a@")


async def test_delete_takes_no_folder_of_another_name(shelf: Shelf) -> None:
    path = make(shelf.first, "b")
    await shelf.operator.load("a", "b", in_place=False)
    with pytest.raises(InvalidRequest, match="no folder of its own"):
        await shelf.operator.delete("a")
    assert path.exists()


async def test_a_pin_taken_away_by_hand_is_seen_at_the_next_look(shelf: Shelf) -> None:
    make(shelf.first, "a")
    await shelf.watcher.scan()
    label = await shelf.use("a")
    write(shelf.first / "a", config=CONFIG | {"lora_alpha": 16})
    await shelf.watcher.scan()
    await shelf.operator.rollback("a")
    assert shelf.store is not None
    shelf.store.set_pin("a", Pin())
    await shelf.watcher.scan()
    assert await shelf.use("a") != label
