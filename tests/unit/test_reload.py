"""SIGHUP reads the keys again; a closed terminal, which sends the same signal, stops the server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.api.auth.access import Access
from server.api.auth.keys import digest_of
from server.cli import reload
from server.cli.access import read_keys
from server.cli.reload import Reloader
from server.settings import Settings
from tests.adapter_folders import AdapterHarness

KEY = "a-key-in-a-file-that-changes"


@pytest.fixture(autouse=True)
def hang_up_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


async def test_a_file_is_read_again_and_a_broken_one_keeps_the_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    write(path, "")
    settings = Settings(api_keys=path)
    access = Access(read_keys(settings))
    assert access.keys.find(KEY.encode()) is None
    write(path, f'[a]\nsha256 = "{digest_of(KEY).hex()}"')
    await Reloader(settings, access).reload()
    assert access.keys.find(KEY.encode()) is not None
    for broken in ("[a", "[a]\nsha256 = 3"):
        caplog.clear()
        write(path, broken)
        await Reloader(settings, access).reload()
        errors = [record for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == 1 and "the keys before it stay" in errors[0].getMessage()
        assert access.keys.find(KEY.encode()) is not None


async def test_aliases_are_read_again(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path)
    reloader = Reloader(Settings(), Access())
    reloader.start(harness.watcher)
    (harness.first / "aliases.toml").write_text('support = "helpdesk"\n')
    await reloader.reload()
    assert list(harness.adapters.names.aliases) == ["support"]


async def test_a_signal_while_the_base_is_loaded_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys were read before the base, so a file that changed meanwhile was not read until the next signal."""
    path = tmp_path / "keys.toml"
    write(path, "")
    settings = Settings(api_keys=path)
    access = Access(read_keys(settings))
    monkeypatch.setattr(reload, "has_terminal", lambda: False)
    reloader = Reloader(settings, access)
    reloader.listen()
    write(path, f'[a]\nsha256 = "{digest_of(KEY).hex()}"')
    os.kill(os.getpid(), signal.SIGHUP)
    assert access.keys.find(KEY.encode()) is None
    reloader.start(AdapterHarness(tmp_path).watcher)
    async with asyncio.timeout(10):
        while access.keys.find(KEY.encode()) is None:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("before", "at_start", "later", "stops"),
    [
        (signal.SIG_DFL, True, False, True),
        (signal.SIG_DFL, True, True, False),
        (signal.SIG_DFL, False, False, False),
        (signal.SIG_IGN, True, False, False),
    ],
)
def test_a_server_stops_with_the_terminal_that_it_was_started_on(
    before: signal.Handlers, at_start: bool, later: bool, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[int] = []
    signal.signal(signal.SIGHUP, before)
    monkeypatch.setattr(reload, "has_terminal", lambda: at_start)
    Reloader(Settings(), Access()).listen()
    monkeypatch.setattr(reload, "has_terminal", lambda: later)
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    os.kill(os.getpid(), signal.SIGHUP)
    assert raised == ([signal.SIGTERM] if stops else [])
