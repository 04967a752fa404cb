"""What happens to a folder happens to the registry, and to nobody else."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from server.adapters.manifest import Manifest
from server.adapters.registry import AdapterRegistry
from server.adapters.watcher import AdapterWatcher
from server.errors import AdapterRejected
from server.metrics import Metrics
from tests.unit.test_manifest import BASE, CONFIG, LIMITS, tensors, write


class Setting:
    """A watcher on two folders, and what it loaded and freed."""

    def __init__(self, root: Path) -> None:
        self.first, self.second = root / "first", root / "second"
        self.first.mkdir()
        self.second.mkdir()
        self.loaded: list[str] = []
        self.freed: list[str] = []
        self.while_loading: Callable[[], None] = lambda: None
        self.metrics = Metrics()
        self.registry = AdapterRegistry(self.freed.append)
        self.watcher = AdapterWatcher(
            [self.first, self.second], self.registry, self._load, base=BASE, limits=LIMITS, metrics=self.metrics
        )

    async def _load(self, manifest: Manifest) -> None:
        if manifest.name == "unloadable":
            raise AdapterRejected(manifest.name, "no")
        if manifest.name == "explosive":
            raise MemoryError
        self.while_loading()
        self.loaded.append(manifest.name)

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.registry.list()]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def make(folder: Path, name: str, **config: object) -> Path:
    path = folder / name
    path.mkdir()
    write(path, config=CONFIG | config, weights=tensors())
    return path


async def test_adapters_there_at_start_are_served_at_once(setting: Setting) -> None:
    make(setting.first, "a")
    await setting.watcher.scan(settled_only=False)
    assert setting.names == ["a"]


async def test_a_folder_that_appears_is_served_when_it_has_settled(setting: Setting) -> None:
    await setting.watcher.scan()
    path = setting.first / "a"
    path.mkdir()
    write(path, config=CONFIG)
    await setting.watcher.scan()
    write(path, weights=tensors())
    await setting.watcher.scan()
    assert setting.names == []
    await setting.watcher.scan()
    assert setting.names == ["a"]
    assert setting.metrics.registry.get_sample_value("quickchange_adapter_rejections_total") == 0


async def test_a_folder_that_disappears_is_gone(setting: Setting) -> None:
    path = make(setting.first, "a")
    await setting.watcher.scan(settled_only=False)
    shutil.rmtree(path)
    await setting.watcher.scan()
    assert setting.names == []
    assert len(setting.freed) == 1


async def test_a_broken_folder_is_reported_once_and_disturbs_nobody(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    make(setting.first, "a")
    make(setting.first, "b", use_dora=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await setting.watcher.scan(settled_only=False)
    assert setting.names == ["a"]
    assert len(caplog.records) == 1
    assert "use_dora" in caplog.text
    assert "use_dora" in setting.watcher.rejected[setting.first / "b"]


async def test_a_mended_folder_is_served(setting: Setting) -> None:
    path = make(setting.first, "a", use_dora=True)
    await setting.watcher.scan(settled_only=False)
    write(path, config=CONFIG)
    await setting.watcher.scan()
    await setting.watcher.scan()
    assert setting.names == ["a"]
    assert setting.watcher.rejected == {}


async def test_an_adapter_replaced_by_a_broken_one_stays(setting: Setting) -> None:
    path = make(setting.first, "a")
    await setting.watcher.scan(settled_only=False)
    served = setting.registry.get("a")
    write(path, config=CONFIG | {"use_dora": True})
    await setting.watcher.scan(settled_only=False)
    assert setting.registry.get("a") is served


async def test_a_changed_folder_is_a_new_version(setting: Setting) -> None:
    path = make(setting.first, "a")
    await setting.watcher.scan(settled_only=False)
    before = setting.registry.acquire("a")
    write(path, config=CONFIG | {"lora_alpha": 16})
    await setting.watcher.scan(settled_only=False)
    assert setting.registry.get("a").version_digest != before.version_digest
    assert setting.freed == []
    setting.registry.release(before)
    assert setting.freed == [before.weights_digest]


async def test_a_touched_but_equal_folder_is_not_loaded_again(setting: Setting) -> None:
    path = make(setting.first, "a")
    await setting.watcher.scan(settled_only=False)
    write(path, config=CONFIG)
    await setting.watcher.scan(settled_only=False)
    assert setting.loaded == ["a"]


async def test_the_first_folder_wins_and_the_second_takes_over(setting: Setting) -> None:
    mine = make(setting.first, "a")
    make(setting.second, "a", lora_alpha=16)
    await setting.watcher.scan(settled_only=False)
    assert setting.registry.get("a").path == mine
    shutil.rmtree(mine)
    await setting.watcher.scan(settled_only=False)
    assert setting.registry.get("a").path == setting.second / "a"


async def test_a_name_is_not_gone_while_its_successor_settles(setting: Setting) -> None:
    """A folder that took a demo's name was a 404 until it had settled, and for good where it was broken."""
    make(setting.second, "a")
    await setting.watcher.scan(settled_only=False)
    mine = make(setting.first, "a", use_dora=True)
    for _ in range(3):
        await setting.watcher.scan()
        assert setting.names == ["a"]
    write(mine, config=CONFIG | {"lora_alpha": 16})
    for _ in range(2):
        await setting.watcher.scan()
    assert setting.registry.get("a").path == mine


async def test_hidden_folders_links_and_files_are_left_alone(setting: Setting) -> None:
    make(setting.first, ".a.partial")
    (setting.first / "link").symlink_to(make(setting.first.parent, "outside"))
    (setting.first / "README.md").write_text("no adapter")
    await setting.watcher.scan(settled_only=False)
    assert (setting.names, setting.watcher.rejected) == ([], {})


async def test_a_missing_adapter_folder_is_waited_for(setting: Setting) -> None:
    setting.first.rmdir()
    await setting.watcher.scan(settled_only=False)
    setting.first.mkdir()
    make(setting.first, "a")
    await setting.watcher.scan(settled_only=False)
    assert setting.names == ["a"]


async def test_a_fault_in_one_folder_stops_neither_the_others_nor_the_watcher(setting: Setting) -> None:
    """Only refusals were caught once: any other error ended the look, and at start the server."""
    make(setting.first, "explosive")
    make(setting.first, "good")
    await setting.watcher.scan(settled_only=False)
    assert setting.names == ["good"]
    assert "could not be loaded (MemoryError)" in setting.watcher.rejected[setting.first / "explosive"]


async def test_weights_let_go_while_equal_ones_are_loaded_stay(setting: Setting) -> None:
    """Once the last lease of a withdrawn version freed the rows that a version of equal bytes had just loaded."""
    old = make(setting.first, "old")
    await setting.watcher.scan(settled_only=False)
    lease = setting.registry.acquire("old")
    setting.while_loading = lambda: setting.registry.release(lease)
    old.rename(setting.first / "new")
    setting.registry.withdraw("old")
    await setting.watcher.scan(settled_only=False)
    assert setting.names == ["new"]
    assert setting.freed == []


async def test_weights_that_do_not_load_are_a_refusal(setting: Setting) -> None:
    make(setting.first, "unloadable")
    await setting.watcher.scan(settled_only=False)
    assert setting.names == []
    assert setting.metrics.registry.get_sample_value("quickchange_adapter_rejections_total") == 1
