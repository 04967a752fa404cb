"""What an operator does to a running server's adapters."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from server.adapters.versions import Pin
from server.errors import AdapterBusy, AdapterRejected, InvalidRequest, ModelNotFound, VersionMoved
from tests.adapter_folders import CONFIG, AdapterHarness, make, write


@pytest.fixture
async def harness(tmp_path: Path) -> AdapterHarness:
    return AdapterHarness(tmp_path, state=True)


async def test_load_serves_a_folder_under_another_name_and_has_it_in_memory(harness: AdapterHarness) -> None:
    make(harness.first / "archive", "a")
    adapter = await harness.operator.load("b", "archive/a", in_place=False)
    assert (adapter.name, harness.loaded, harness.names) == ("b", ["b"], ["b"])
    await harness.watcher.scan()
    assert "b" in harness.names


async def test_load_refuses_a_name_that_is_taken_unless_in_place(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    make(harness.first / "archive", "other", lora_alpha=16)
    before = (await harness.operator.load("a", "a", in_place=True)).version_digest
    with pytest.raises(InvalidRequest, match="load_inplace"):
        await harness.operator.load("a", "archive/other", in_place=False)
    assert (await harness.operator.load("a", "archive/other", in_place=True)).version_digest != before


async def test_load_and_unload_of_another_version_than_the_expected_change_nothing(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    make(harness.first / "archive", "other", lora_alpha=16)
    current = (await harness.operator.load("a", "a", in_place=True)).version_digest
    with pytest.raises(VersionMoved, match="Nothing was changed"):
        await harness.operator.load("a", "archive/other", in_place=True, expected=current[:12])
    with pytest.raises(VersionMoved):
        await harness.operator.load("b", "archive/other", in_place=False, expected=current[:12])
    with pytest.raises(VersionMoved):
        await harness.operator.unload("a", expected="0" * 12)
    await harness.watcher.scan()
    assert harness.names == ["a"]
    assert (await harness.use("a")) == f"a@{current[:12]}"
    assert (await harness.operator.load("a", "a", in_place=True, expected=current[:4])).version_digest == current
    await harness.operator.unload("a", expected=current)
    assert harness.names == []


async def test_a_load_that_meets_another_of_the_same_adapter_is_refused(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    first, second = await asyncio.gather(
        harness.operator.load("a", "a", in_place=True),
        harness.operator.load("a", "a", in_place=True),
        return_exceptions=True,
    )
    assert isinstance(second, AdapterBusy)
    assert not isinstance(first, BaseException)
    await harness.operator.load("a", "a", in_place=True)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc", "a/../../outside", "", ".", ".hidden", "link", "link/x", "a\0b", "missing", "a/."]
)
async def test_load_takes_no_path_outside_the_adapter_folder(harness: AdapterHarness, path: str) -> None:
    outside = make(harness.first.parent, "outside")
    make(harness.first, ".hidden")
    (harness.first / "link").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="lora_path"):
        await harness.operator.load("x", path, in_place=False)
    assert harness.names == []


async def test_load_tells_why_a_folder_is_refused(harness: AdapterHarness) -> None:
    make(harness.first, "a", layer_replication=[[0, 2]])
    with pytest.raises(AdapterRejected, match="layer_replication"):
        await harness.operator.load("a", "a", in_place=False)


async def test_an_unloaded_adapter_stays_away_until_its_folder_changes(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    await harness.use("a")
    await harness.operator.unload("a")
    await harness.watcher.scan()
    assert harness.names == []
    assert len(harness.freed) == 1
    write(harness.first / "a", config=CONFIG | {"lora_alpha": 16})
    await harness.watcher.scan()
    assert harness.names == ["a"]
    with pytest.raises(ModelNotFound):
        await harness.operator.unload("ghost")


async def test_an_unloaded_adapter_can_be_loaded_again(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    await harness.operator.unload("a")
    await harness.operator.load("a", str(harness.first / "a"), in_place=False)
    assert harness.names == ["a"]


async def test_delete_removes_folder_versions_and_pin(harness: AdapterHarness) -> None:
    path = make(harness.first, "a")
    await harness.watcher.scan()
    label = await harness.use("a")
    await harness.operator.pin("a", None)
    await harness.operator.delete("a")
    assert (path.exists(), harness.names, list(harness.first.iterdir())) == (False, [], [])
    with pytest.raises(ModelNotFound):
        await harness.use(label)
    assert harness.store is not None
    assert harness.store.pins() == {}


async def test_delete_leaves_the_demo_adapters_alone(harness: AdapterHarness) -> None:
    path = make(harness.second, "a")
    await harness.watcher.scan()
    with pytest.raises(InvalidRequest, match="unload it"):
        await harness.operator.delete("a")
    assert path.exists()


async def test_rollback_goes_back_version_by_version_and_unpin_returns(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    labels = [await harness.use("a")]
    for alpha in (16, 32):
        write(harness.first / "a", config=CONFIG | {"lora_alpha": alpha})
        await harness.watcher.scan()
        labels.append(await harness.use("a"))
    assert (await harness.operator.rollback("a")).label == labels[1]
    assert await harness.use("a") == labels[1]
    assert (await harness.operator.rollback("a")).label == labels[0]
    with pytest.raises(InvalidRequest, match="has no version before"):
        await harness.operator.rollback("a")
    await harness.operator.unpin("a")
    assert await harness.use("a") == labels[2]


async def test_a_pinned_name_does_not_move_when_its_folder_changes_or_goes_back(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    label = await harness.use("a")
    await harness.operator.pin("a", label.partition("@")[2])
    write(harness.first / "a", config=CONFIG | {"lora_alpha": 16})
    await harness.watcher.scan()
    assert await harness.use("a") == label
    shutil.rmtree(harness.first / "a")
    await harness.watcher.scan()
    assert harness.names == []


async def test_pin_refuses_a_version_that_is_not_kept(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    with pytest.raises(ModelNotFound):
        await harness.operator.pin("a", "0000")


@pytest.mark.parametrize("state", [False, True])
async def test_a_deleted_names_pin_does_not_wait_for_its_next_folder(tmp_path: Path, state: bool) -> None:
    harness = AdapterHarness(tmp_path, state=state)
    make(harness.first, "a")
    await harness.watcher.scan()
    await harness.operator.pin("a", (await harness.use("a")).partition("@")[2])
    await harness.operator.delete("a")
    make(harness.first, "a", lora_alpha=16)
    await harness.watcher.scan()
    assert (await harness.use("a")).startswith("a@")


async def test_delete_takes_no_folder_of_another_name(harness: AdapterHarness) -> None:
    path = make(harness.first, "b")
    await harness.operator.load("a", "b", in_place=False)
    with pytest.raises(InvalidRequest, match="is not directly inside the adapter folder"):
        await harness.operator.delete("a")
    assert path.exists()


async def test_a_pin_taken_away_by_hand_is_seen_at_the_next_look(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    label = await harness.use("a")
    write(harness.first / "a", config=CONFIG | {"lora_alpha": 16})
    await harness.watcher.scan()
    await harness.operator.rollback("a")
    assert harness.store is not None
    harness.store.set_pin("a", Pin())
    await harness.watcher.scan()
    assert await harness.use("a") != label
