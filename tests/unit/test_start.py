"""A start that fails half-way says why, and leaves no thread, no socket and no task behind."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from server.adapters.content.manifest import AdapterPolicy
from server.adapters.content.signature import BaseSignature
from server.adapters.reader import AdapterReader
from server.adapters.watcher import AdapterWatcher
from server.api.auth.access import Access
from server.cli import serve
from server.cli.folders import check_folders
from server.cli.listening import bound_sockets
from server.cli.serve import Service, run_server
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.errors import SettingsError, StartFailed
from server.metrics import Metrics
from server.model.sampler import Sampler
from server.settings import Settings
from tests.fakes import FakeEngine, server_state
from tests.unit.test_async_engine import ScriptedRunner


class Parts:
    """The parts of a server without a model, each with a thread of its own; what is in ``broken`` does not start."""

    def __init__(self, tmp_path: Path) -> None:
        self._before = threading.enumerate()
        scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=100)
        self.engine = AsyncEngine(Engine(scheduler, ScriptedRunner(), Sampler(), Metrics()), max_queued_seqs=2)
        state = server_state(FakeEngine())
        state.adapters.reader = state.adapters.sync.reader = AdapterReader(
            BaseSignature("base", "", {}), AdapterPolicy(max_rank=8, max_bytes=1000)
        )
        self.watcher = AdapterWatcher([tmp_path], state.adapters, settle=0.01, grace=0.0)
        self.service = Service(replace(state, engine=self.engine), self.engine, self.watcher, Settings())

    def threads(self) -> set[str]:
        """Names of the server's threads that are still there, when each has had time to end."""
        new = [thread for thread in threading.enumerate() if thread not in self._before]
        for thread in new:
            thread.join(5)
        return {thread.name for thread in new if thread.is_alive()}

    def break_(self, owner: Any, name: str) -> None:
        """Let a method raise."""

        def raising(*given: object) -> None:
            raise RuntimeError("can't start new thread")

        setattr(owner, name, raising)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    made = Parts(tmp_path)
    monkeypatch.setattr(serve, "build", lambda settings, access: made.service)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    threads = torch.get_num_threads()
    yield made
    transformers_logging.enable_default_handler()
    transformers_logging.disable_propagation()
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("broken", ["reader", "engine", "watcher"])
def test_a_start_that_fails_half_way_leaves_no_thread_and_says_why(parts: Parts, broken: str) -> None:
    """The engine's thread and the reader's stayed where the adapters could not be read."""
    reader = parts.service.state.adapters.reader
    owner, name = {
        "reader": (reader, "run"),
        "engine": (parts.engine._thread, "start"),
        "watcher": (parts.watcher, "start"),
    }[broken]
    parts.break_(owner, name)
    with bound_sockets("127.0.0.1", 0) as sockets:
        with pytest.raises(StartFailed, match=r"did not start.*RuntimeError: can't start new thread"):
            run_server(Settings(), sockets, Access())
        address = sockets[0].getsockname()
    assert parts.threads() == set()
    assert not parts.engine.alive
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_lines_of_transformers_are_logged_as_the_servers_own(parts: Parts) -> None:
    """Its handler wrote them as text between the lines of JSON."""
    parts.break_(parts.watcher, "start")
    with bound_sockets("127.0.0.1", 0) as sockets, pytest.raises(StartFailed):
        run_server(Settings(), sockets, Access())
    library = logging.getLogger("transformers")
    assert not any(type(handler) is logging.StreamHandler for handler in library.handlers)
    assert library.propagate
    assert parts.threads() == set()


def test_a_known_reason_is_told_as_it_is(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start() -> None:
        raise SettingsError("choose another folder")

    monkeypatch.setattr(parts.watcher, "start", start)
    with bound_sockets("127.0.0.1", 0) as sockets, pytest.raises(SettingsError, match=r"^choose another folder$"):
        run_server(Settings(), sockets, Access())
    assert parts.threads() == set()


def test_a_folder_that_cannot_be_read_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    settings = Settings(adapters_dir=tmp_path / "later", demo_adapters=False)
    check_folders(settings)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scandir)
        with pytest.raises(SettingsError, match=r"later cannot be read \(Permission denied\).*--adapters-dir"):
            check_folders(settings)
    (tmp_path / "later").write_text("no folder")
    with pytest.raises(SettingsError, match=r"later cannot be read \(Not a directory\)"):
        check_folders(settings)


def test_an_address_that_is_taken_leaves_no_socket() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(SettingsError, match=r"cannot listen on 127.0.0.1"),
            bound_sockets("127.0.0.1", taken.getsockname()[1]),
        ):
            pass
