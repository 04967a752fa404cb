"""Files that the server's user may not read: said so, and no reason to refuse an adapter that can do without them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.adapters.content.diagnostics import diagnose
from server.adapters.content.folder import OPTIONAL_FILES, UNREAD_FILES
from server.adapters.content.manifest import list_folder, read_manifest
from server.cli.command_line import parse_settings
from server.cli.convert.command import main as convert
from server.cli.folders import open_store
from server.errors import AdapterRejected, ModelNotFound, SettingsError
from tests.adapter_folders import BASE, LIMITS, SIDECAR, AdapterHarness, write
from tests.adapter_folders import make as make_folder

NOBODY = 65534
FILES = ("adapter_config.json", "adapter_model.safetensors", "quickchange.json")
TOKENS = ("tokenizer.json", "added_tokens.json")


def make(folder: Path, name: str, **config: object) -> Path:
    """A good adapter that everybody may read; safetensors writes files for their owner alone."""
    path = make_folder(folder, name, **config)
    (path / "adapter_model.safetensors").chmod(0o644)
    return path


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that another user may enter; pytest's own is for one user alone."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def other_user() -> Iterator[None]:
    """Within the block root is another user; any other stays who it is."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@contextlib.contextmanager
def closed(*paths: Path) -> Iterator[None]:
    """Within the block this process may not read the paths: root becomes another user, any other loses its rights."""
    modes = {path: path.stat().st_mode for path in paths}
    is_root = os.geteuid() == 0
    for path in paths:
        path.chmod(0o600 if is_root else 0)
    if is_root:
        os.seteuid(NOBODY)
    try:
        for path in paths:
            with pytest.raises(PermissionError):
                os.listdir(path) if path.is_dir() else path.read_bytes()
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_user_is_permission_denied_with_the_way_out(root: Path, name: str) -> None:
    """It was called a link, and whoever looked for one found none."""
    folder = make(root, "a")
    write(folder, sidecar=SIDECAR)
    with closed(folder / name):
        for judge in (list_folder, read_manifest):
            with pytest.raises(AdapterRejected) as refused:
                judge(folder, BASE, LIMITS)
            reason = refused.value.reason
            assert reason.startswith(f"permission denied: {name} cannot be read (its mode is 0")
            assert f"the server runs as user {os.geteuid()}" in reason and "chmod a+r it, chown it to" in reason
            assert "link" not in reason
        assert reason in diagnose(folder, BASE, LIMITS).problems


def test_a_folder_of_another_user_is_permission_denied(root: Path) -> None:
    folder = make(root, "a")
    with closed(folder), pytest.raises(AdapterRejected, match=r"^.*permission denied: the folder .*chmod a\+rx it"):
        read_manifest(folder, BASE, LIMITS)


def test_a_folder_that_may_be_listed_and_not_entered_is_the_one_to_open(root: Path) -> None:
    """The way out was a chmod of the file, which everybody could read already."""
    folder = make(root, "a")
    folder.chmod(0o744 if os.geteuid() == 0 else 0o400)
    mode = "0744" if os.geteuid() == 0 else "0400"
    with other_user(), pytest.raises(AdapterRejected) as refused:
        read_manifest(folder, BASE, LIMITS)
    folder.chmod(0o755)
    assert refused.value.reason.startswith("permission denied: adapter_config.json cannot be reached")
    assert f"the folder's mode is {mode}" in refused.value.reason and "chmod a+rx the folder" in refused.value.reason


async def test_a_closed_folder_takes_the_events_from_no_other(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system's refusal to tell of one folder ended the events of all, which were looked at every second then."""
    closed_one, other = make(root, "first/closed"), make(root, "first/other")
    harness = AdapterHarness(root, settle=0.05)
    caplog.set_level(logging.INFO)
    with closed(closed_one):
        await asyncio.sleep(0.06)
        await harness.watcher.start()
        watching = asyncio.create_task(harness.watcher.run())
        await asyncio.sleep(0.3)
        listening = harness.watcher._listening
        assert listening is not None and not listening.done()
        watching.cancel()
    assert harness.names == [other.name] and "no events" not in caplog.text


@pytest.mark.parametrize("name", TOKENS)
def test_a_closed_list_of_tokens_refuses_the_adapter(root: Path, name: str) -> None:
    """It was served with the base's tokens, so that prompts had other ids than in training where it added some."""
    folder = make(root, "a")
    (folder / name).write_text("{}")
    with closed(folder / name):
        for judge in (list_folder, read_manifest):
            with pytest.raises(AdapterRejected, match=f"^.*permission denied: {name} cannot be read"):
                judge(folder, BASE, LIMITS)
        [problem] = diagnose(folder, BASE, LIMITS).problems
    assert problem.startswith(f"permission denied: {name}")


@pytest.mark.parametrize("name", sorted(UNREAD_FILES.keys() - set(TOKENS)))
async def test_an_optional_file_that_may_not_be_read_refuses_no_adapter(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It was refused for a file that says no more than a default; what it would have said is missed aloud."""
    folder = make(root, "first/a")
    (folder / name).write_text("never read")
    harness = AdapterHarness(root)
    with closed(folder / name):
        await harness.watcher.scan()
        label = await harness.use("a")
        assert diagnose(folder, BASE, LIMITS).problems == []
    assert label.startswith("a@")
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith(f"adapter a is served without {name} ({UNREAD_FILES[name]}): permission denied: {name}")
    assert name in harness.registry.get("a").listing.unread


@pytest.mark.parametrize("name", ["Modelfile", "a.gguf", "folder"])
def test_a_source_to_convert_that_may_not_be_read_is_a_line(
    root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ended with a traceback."""
    source = root / name
    if name == "folder":
        source.mkdir()
    else:
        source.write_bytes(b"GGUF")
    with closed(source):
        assert convert([str(source), "--out", str(root / "made")]) == 1
    assert capsys.readouterr().err.startswith(f"quickchange: permission denied: {source}")


def test_a_state_directory_of_another_user_is_refused_when_it_is_opened(root: Path) -> None:
    """Listing the adapters ended in a traceback, and the server logged one for every scan."""
    state = root / "state"
    state.mkdir()
    settings = parse_settings("serve", ["--state-dir", str(state)])
    with (
        closed(state),
        pytest.raises(SettingsError, match=r"state_dir .*state cannot be made or read \(Permission denied"),
    ):
        open_store(settings)


async def test_a_file_that_may_be_read_again_is_read(root: Path) -> None:
    folder = make(root, "first/a")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5}')
    harness = AdapterHarness(root)
    with closed(folder / "generation_config.json"):
        await harness.watcher.scan()
        before = await harness.use("a")
    await harness.watcher.scan()
    assert await harness.use("a") != before
    entry = harness.registry.get("a")
    assert (entry.listing.unread, entry.listing.defaults.temperature) == ({}, 0.5)


def test_a_template_beside_a_source_that_may_not_be_read_is_not_trusted(root: Path) -> None:
    """A sidecar's template is our trainer's own unless the folder is from a hub; a closed note says neither."""
    limits = LIMITS.__class__(max_rank=8, max_bytes=100_000, trust_chat_templates=False)
    folder = make(root, "a")
    write(folder, sidecar=SIDECAR | {"chat_template": "{{ messages }}"})
    assert read_manifest(folder, BASE, limits).defaults.chat_template == "{{ messages }}"
    (folder / "source.json").write_text("{}")
    with closed(folder / "source.json"), pytest.raises(AdapterRejected, match="--trust-chat-templates"):
        read_manifest(folder, BASE, limits)


def test_a_file_that_nobody_reads_may_be_closed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(root, "a")
    (folder / "README.md").write_text("a card")
    with closed(folder / "README.md"):
        assert read_manifest(folder, BASE, LIMITS).unread == {}


def test_every_optional_file_is_decided_upon() -> None:
    assert set(OPTIONAL_FILES) - set(UNREAD_FILES) == {"quickchange.json", "added_tokens.json"}


async def test_what_is_closed_while_it_is_served_is_told_with_what_becomes_of_the_version_before(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The version read before was called served where its bytes were nowhere any more."""
    used, unused = make(root, "first/used"), make(root, "first/unused", lora_alpha=16)
    harness = AdapterHarness(root)
    await harness.watcher.scan()
    label = await harness.use("used")
    await harness.version("unused")
    with closed(used / FILES[1], unused / FILES[1]):
        await harness.watcher.scan()
        assert await harness.use("used") == label
        with pytest.raises(ModelNotFound):
            await harness.use("unused")
        assert harness.names == ["used"]
    lines = {line.split()[2]: line for line in (record.getMessage() for record in caplog.records)}
    assert "permission denied" in lines["used"] and "permission denied" in lines["unused"]
    assert lines["used"].endswith("; the previous version is still served")
    assert "still served" not in lines["unused"]
    await harness.watcher.scan()
    assert harness.names == ["unused", "used"]


async def test_an_adapter_folder_that_cannot_be_looked_at_is_told_once_and_what_was_served_stays(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same line was logged at every look."""
    make(root, "first/a")
    harness = AdapterHarness(root)
    await harness.watcher.scan()
    label = await harness.use("a")
    with closed(harness.first):
        for _ in range(3):
            assert not await harness.watcher.scan()
        assert await harness.use("a") == label
    (line,) = caplog.messages
    assert str(harness.first) in line and "Permission denied" in line
    assert await harness.watcher.scan()
