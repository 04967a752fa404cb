"""What trainers, archivers and file systems leave in and beside an adapter's folder is none of its content."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from server.adapters.content.manifest import read_manifest
from tests.adapter_folders import BASE, CONFIG, LIMITS, AdapterHarness, make, write

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def put(*paths: Path) -> None:
    """Files of somebody else's."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of no concern")


LEFTOVERS: dict[str, Callable[[Path], object]] = {
    "huggingface-cli": lambda path: put(path / ".cache" / "huggingface" / "download" / f"{CONFIG_FILE}.metadata"),
    "git": lambda path: put(path / ".git" / "config"),
    "a Mac": lambda path: put(path / ".DS_Store", path / f"._{CONFIG_FILE}"),
    "an archiver": lambda path: put(path.parent / "__MACOSX" / "._a"),
    "a trainer": lambda path: make(path, "checkpoint-500", lora_alpha=99),
    "a file system": lambda path: (path.parent / "lost+found").mkdir(),
    "a storage box": lambda path: put(path / "@eaDir" / "x"),
    "a second name": lambda path: os.link(path / WEIGHTS_FILE, path / "second"),
}


@pytest.mark.parametrize("leave", LEFTOVERS.values(), ids=LEFTOVERS)
async def test_what_tools_leave_beside_an_adapter_changes_nothing(
    tmp_path: Path, leave: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    harness = AdapterHarness(tmp_path)
    path = make(harness.first, "a")
    digest = read_manifest(path, BASE, LIMITS).version_digest
    leave(path)
    await harness.watcher.scan()
    assert await harness.version("a") == digest
    assert (harness.names, harness.sync.refusals, caplog.messages) == (["a"], {}, [])


async def test_a_trainer_that_writes_checkpoints_inside_does_not_unsettle_an_adapter(tmp_path: Path) -> None:
    """A folder inside counted as a file, whose times moved with every checkpoint."""
    harness = AdapterHarness(tmp_path, settle=0.1)
    path = make(harness.first, "a")
    await harness.watcher.start()
    (path / "runs").mkdir()
    await asyncio.sleep(0.12)
    (path / "runs" / "events").write_text("a step")
    assert await harness.watcher.scan()
    assert harness.names == ["a"]


async def test_content_that_changed_without_its_size_or_times_is_never_served_as_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems have coarse times; bytes are hashed whenever they are loaded."""
    monkeypatch.setattr("server.adapters.reader.folder_state", lambda path, roots: ())
    monkeypatch.setattr("server.adapters.watcher.folder_state", lambda path, roots: ())
    harness = AdapterHarness(tmp_path, room=1)
    path = make(harness.first, "a", lora_alpha=16)
    make(harness.first, "b")
    await harness.watcher.scan()
    before = await harness.use("a")
    await harness.use("b")
    write(path, config=CONFIG | {"lora_alpha": 61})
    await harness.watcher.scan()
    assert await harness.use("a") != before
    assert harness.registry.get("a").listing.config.alpha == 61
