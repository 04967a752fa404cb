"""What was kept stays, whoever else writes, whatever crashes, however full the disk."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from server.adapters.versions import CachedDigest, KeptVersion, Pin, VersionStore

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256))}
BAD_NAMES = ["", ".", "..", "../a", "a/b", ".tmp-a", "a\0", "a\n", "a b", "n" * 129, "a\u2024"]
BAD_DIGESTS = ["", "ab12", "..", "A" * 64, "g" * 64, "a" * 65, "a" * 64 + "\n", "../" + "a" * 61]


def digest(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path / "state", keep=2)


def put(store: VersionStore, name: str, *numbers: int) -> None:
    for number in numbers:
        store.put(name, digest(number), FILES)


def kept(store: VersionStore, name: str) -> list[int]:
    return [int(version.digest, 16) for version in store.versions(name)]


def folders(store: VersionStore) -> list[int]:
    return sorted(int(path.name, 16) for path in (store.state_dir / "versions").iterdir())


def everything(store: VersionStore) -> dict[str, bytes]:
    """Every file of the store but the empty lock."""
    paths = [path for path in store.state_dir.rglob("*") if path.is_file()]
    return {str(path.relative_to(store.state_dir)): path.read_bytes() for path in paths if path.name != ".lock"}


def test_a_store_that_was_never_written_is_empty(store: VersionStore) -> None:
    assert (store.names(), store.versions("a"), store.pins(), store.load_digests()) == ([], [], {}, {})
    assert store.folder(digest(1)) is None
    assert not store.state_dir.exists()


def test_a_version_is_there_after_a_restart_byte_for_byte(store: VersionStore) -> None:
    before = int(time.time())
    put(store, "a", 1)
    again = VersionStore(store.state_dir, keep=2)
    folder = again.folder(digest(1))
    assert folder is not None
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    (version,) = again.versions("a")
    assert version.digest == digest(1)
    assert before <= version.kept_at <= time.time()
    assert again.names() == ["a"]


def test_versions_are_listed_oldest_first_and_putting_one_again_makes_it_the_newest(store: VersionStore) -> None:
    put(store, "a", 1, 2)
    assert kept(store, "a") == [1, 2]
    put(store, "a", 1)
    assert kept(store, "a") == [2, 1]


def test_putting_the_newest_again_writes_nothing(store: VersionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a", 1)
    monkeypatch.setattr(os, "fsync", full_disk)
    put(store, "a", 1)
    assert kept(store, "a") == [1]


def test_the_content_of_a_version_that_is_there_is_left_alone(store: VersionStore) -> None:
    put(store, "a", 1)
    store.put("b", digest(1), {"other": b""})
    folder = store.folder(digest(1))
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert (kept(store, "a"), kept(store, "b")) == ([1], [1])


def test_the_last_versions_of_a_name_are_kept_and_the_others_go(store: VersionStore) -> None:
    put(store, "a", 1, 2, 3, 4)
    assert (kept(store, "a"), folders(store)) == ([3, 4], [3, 4])


def test_a_pinned_version_stays_besides_the_last_ones_until_it_is_let_go(store: VersionStore) -> None:
    put(store, "a", 1)
    store.set_pin("a", Pin(digest(1)))
    put(store, "a", 2, 3, 4)
    assert kept(store, "a") == [1, 3, 4]
    store.set_pin("a", Pin())
    put(store, "a", 4)
    assert (kept(store, "a"), folders(store)) == ([3, 4], [3, 4])


def test_a_version_that_another_name_has_or_pins_stays(store: VersionStore) -> None:
    put(store, "b", 1)
    store.set_pin("c", Pin(digest(2)))
    put(store, "a", 1, 2, 3, 4)
    assert (kept(store, "a"), kept(store, "b"), folders(store)) == ([3, 4], [1], [1, 2, 3, 4])


def test_nothing_is_pruned_while_a_pin_cannot_be_read(store: VersionStore) -> None:
    put(store, "a", 1)
    (store.state_dir / "pins" / "a.json").write_text("{")
    put(store, "a", 2, 3)
    assert kept(store, "a") == [1, 2, 3]


def test_no_folder_is_removed_while_a_history_cannot_be_read(store: VersionStore) -> None:
    put(store, "a", 1)
    put(store, "b", 9)
    (store.state_dir / "history" / "b.json").write_text('{"schema_version": 2}')
    put(store, "a", 2, 3)
    assert (kept(store, "a"), folders(store)) == ([2, 3], [1, 2, 3, 9])


def test_a_smaller_number_to_keep_applies_to_what_is_there(store: VersionStore) -> None:
    put(store, "a", 1, 2)
    put(VersionStore(store.state_dir, keep=1), "a", 2)
    assert folders(store) == [2]
    put(VersionStore(store.state_dir, keep=0), "a", 2, 3)
    assert (kept(store, "a"), folders(store)) == ([], [])


def test_a_version_whose_folder_is_gone_is_not_listed_and_can_be_put_again(store: VersionStore) -> None:
    put(store, "a", 1, 2)
    folder = store.folder(digest(2))
    assert folder is not None
    folder.rename(store.state_dir.parent / "elsewhere")
    assert kept(store, "a") == [1]
    put(store, "a", 2)
    assert (kept(store, "a"), folders(store)) == ([1, 2], [1, 2])


def test_a_forgotten_name_leaves_only_what_others_have(store: VersionStore) -> None:
    put(store, "a", 1, 2)
    put(store, "b", 2)
    store.set_pin("a", Pin(digest(1), resident=True))
    store.forget("a")
    assert (store.names(), store.pins(), folders(store)) == (["b"], {}, [2])
    store.forget("never-there")


def test_pins_survive_a_restart_and_an_empty_one_is_no_file(store: VersionStore) -> None:
    store.set_pin("a", Pin(digest(1)))
    store.set_pin("b.json", Pin(resident=True))
    assert VersionStore(store.state_dir, keep=1).pins() == {"a": Pin(digest(1)), "b.json": Pin(resident=True)}
    store.set_pin("a", Pin())
    store.set_pin("c", Pin())
    assert store.pins() == {"b.json": Pin(resident=True)}
    assert [path.name for path in (store.state_dir / "pins").iterdir()] == ["b.json.json"]


def test_the_state_of_pins_changes_with_every_pin_and_with_nothing_else(store: VersionStore) -> None:
    seen = [store.pins_state()]
    for name, pin in [("a", Pin(digest(1))), ("a", Pin(digest(2))), ("b", Pin(resident=True)), ("a", Pin())]:
        store.set_pin(name, pin)
        assert store.pins_state() not in seen
        seen.append(store.pins_state())
    put(store, "a", 1)
    store.save_digests({})
    assert store.pins_state() == seen[-1]


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"schema_version": 2, "version": null, "resident": true}',
    b'{"schema_version": 1, "version": "ab12", "resident": true}',
    b'{"schema_version": 1, "version": 7, "resident": true}',
    b'{"schema_version": 1, "version": null, "resident": 1}', b'{"schema_version": 1}',
    b'{"schema_version": 1, "version": null, "resident": true, "until": 5}', None,
])  # fmt: skip
def test_a_pin_that_cannot_be_used_is_reported_once_for_a_content_and_ignored(
    store: VersionStore, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    store.set_pin("good", Pin(resident=True))
    path = store.state_dir / "pins" / "bad.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert [store.pins() for _ in range(3)] == [{"good": Pin(resident=True)}] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "pins/bad.json cannot be used" in record.getMessage()
    if content is not None:
        path.write_bytes(content + b"?")
        store.pins()
        assert len(caplog.records) == 2


def test_digests_come_back_as_they_were(store: VersionStore) -> None:
    digests = {
        "a": CachedDigest((("adapter_config.json", 2**64, 1, 2**61), ("\udcff", 0)), digest(1), digest(2)),
        "/somewhere/b": CachedDigest((), digest(3), digest(4)),
    }
    store.save_digests(digests)
    assert VersionStore(store.state_dir, keep=1).load_digests() == digests
    store.save_digests({})
    assert store.load_digests() == {}


@pytest.mark.parametrize("cached", [
    "null", '{"signature": [1.5], "weights_digest": "D", "version_digest": "D"}',
    '{"signature": [true], "weights_digest": "D", "version_digest": "D"}', '{"signature": [], "weights_digest": "D"}',
    '{"signature": {}, "weights_digest": "D", "version_digest": "D"}',
    '{"signature": [], "weights_digest": "D", "version_digest": "../D"}',
])  # fmt: skip
def test_a_malformed_cache_of_digests_is_reported_and_empty(
    store: VersionStore, cached: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.save_digests({})
    text = f'{{"schema_version": 1, "digests": {{"a": {cached}}}}}'.replace("D", digest(1))
    (store.state_dir / "digests.json").write_text(text)
    assert store.load_digests() == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_name_never_becomes_a_path(store: VersionStore, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put(name, digest(1), FILES),
        lambda: store.put("a", digest(1), {name: b""}),
        lambda: store.versions(name),
        lambda: store.forget(name),
        lambda: store.set_pin(name, Pin(resident=True)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is no "):
            call()
    assert not store.state_dir.exists()


@pytest.mark.parametrize("text", BAD_DIGESTS)
def test_what_is_no_digest_never_becomes_a_path(store: VersionStore, text: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put("a", text, FILES),
        lambda: store.folder(text),
        lambda: store.set_pin("a", Pin(text)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is no version digest"):
            call()
    assert not store.state_dir.exists()


def test_files_that_are_not_the_stores_own_are_left_alone(store: VersionStore) -> None:
    put(store, "a", 1)
    strangers = [
        store.state_dir / place for place in ("versions/notes", "history/.hidden", "pins/b c.json", "history/x")
    ]
    for path in strangers:
        path.write_bytes(b"")
    put(store, "a", 2, 3)
    assert (store.names(), store.pins()) == (["a"], {})
    assert all(path.exists() for path in strangers)


def test_what_a_crash_left_behind_is_removed_when_it_is_old(store: VersionStore) -> None:
    put(store, "a", 1)
    old, young = store.state_dir / ".tmp-old", store.state_dir / ".tmp-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    old_file = store.state_dir / ".tmp-file"
    old_file.write_bytes(b"{")
    for path in (old, old_file):
        os.utime(path, (0, time.time() - 3700))
    put(store, "a", 2)
    assert sorted(path.name for path in store.state_dir.glob(".tmp-*")) == [".tmp-young"]
    assert kept(store, "a") == [1, 2]


def test_a_version_that_a_crash_left_without_a_name_goes_with_the_next_one_that_goes(store: VersionStore) -> None:
    put(store, "a", 1, 2)
    (store.state_dir / "versions" / digest(7)).mkdir()
    put(store, "a", 3)
    assert folders(store) == [2, 3]


def test_files_have_the_modes_of_the_umask(store: VersionStore) -> None:
    before = os.umask(0o027)
    try:
        put(store, "a", 1)
        store.set_pin("a", Pin(resident=True))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.state_dir.rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert stat.S_IMODE((store.state_dir / "versions" / digest(1)).stat().st_mode) == 0o750


def test_every_file_says_its_schema_version(store: VersionStore) -> None:
    put(store, "a", 1)
    store.set_pin("a", Pin(digest(1)))
    store.save_digests({})
    for place in ("history/a.json", "pins/a.json", "digests.json"):
        assert json.loads((store.state_dir / place).read_bytes())["schema_version"] == 1


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """Fails at one touch of it: a sync, a rename, a new folder."""

    def __init__(self, patch: pytest.MonkeyPatch, *, fails_at: int) -> None:
        self.left = fails_at
        for name in ("fsync", "replace", "rename", "mkdir"):
            patch.setattr(os, name, partial(self._touch, getattr(os, name)))

    def _touch(self, call: Callable[..., object], *args: object, **kwargs: object) -> object:
        self.left -= 1
        if self.left == 0:
            full_disk()
        return call(*args, **kwargs)


def test_a_full_disk_is_told_and_leaves_the_store_before_or_after_the_call(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = set()
    for number in range(1, 100):
        put(store, "a", 1, 2)
        with monkeypatch.context() as patch:
            disk = Disk(patch, fails_at=number)
            with contextlib.suppress(OSError):
                put(store, "a", 3)
        assert list(store.state_dir.glob(".tmp-*")) == []
        assert folders(store) == kept(store, "a")
        outcomes.add(tuple(kept(store, "a")))
        if disk.left > 0:
            break
    assert outcomes == {(1, 2), (2, 3)}
    assert number > 10


def test_what_could_not_be_written_leaves_what_was_there_before(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set_pin("a", Pin(digest(1)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            store.set_pin("a", Pin(digest(2)))
        with pytest.raises(OSError, match="No space left"):
            store.save_digests({})
        with pytest.raises(OSError, match="No space left"):
            put(store, "a", 3)
    assert store.pins() == {"a": Pin(digest(1))}
    assert list(everything(store)) == ["pins/a.json"]


def test_a_store_that_may_not_be_written_can_be_read(store: VersionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a", 1)
    store.set_pin("a", Pin(digest(1)))
    before = everything(store)
    opened = os.open

    def read_only(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(OSError, match="Read-only"):
            put(store, "a", 2)
        with pytest.raises(OSError, match="Read-only"):
            store.forget("a")
        with pytest.raises(OSError, match="Read-only"):
            store.set_pin("a", Pin())
        assert (kept(store, "a"), store.pins()) == ([1], {"a": Pin(digest(1))})
    assert everything(store) == before


def test_a_state_directory_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(OSError, match="state"):
        put(VersionStore(tmp_path / "state", keep=1), "a", 1)


def test_two_stores_on_one_folder_lose_nothing_of_each_other(tmp_path: Path) -> None:
    stores = [VersionStore(tmp_path, keep=1000) for _ in range(4)]

    def write(number: int) -> None:
        store = stores[number % len(stores)]
        store.put("shared", digest(number), FILES)
        store.set_pin(f"pin-{number}", Pin(digest(number)))

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(write, range(40)))
    assert sorted(kept(stores[0], "shared")) == list(range(40))
    assert len(stores[1].pins()) == 40


def test_a_store_that_prunes_beside_another_removes_nothing_that_it_keeps(tmp_path: Path) -> None:
    stores = [VersionStore(tmp_path, keep=2) for _ in range(2)]

    def write(number: int) -> None:
        stores[number % 2].put(f"name-{number % 3}", digest(number % 5), FILES)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(60)))
    mentioned = {version for name in stores[0].names() for version in kept(stores[0], name)}
    assert folders(stores[0]) == sorted(mentioned)
    for name in stores[0].names():
        history = json.loads((tmp_path / "history" / f"{name}.json").read_bytes())["versions"]
        assert [KeptVersion(**one) for one in history] == stores[0].versions(name)
