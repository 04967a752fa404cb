"""Links are followed where they stay inside the operator's roots, judged by what was opened."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.adapters.content import folder as folder_module
from server.adapters.content import safe_open
from server.adapters.content.diagnostics import diagnose
from server.adapters.content.folder import folder_state, read_file, read_files
from server.adapters.content.manifest import read_manifest
from server.adapters.reader import AdapterReader, FolderMoved
from server.errors import AdapterRejected, InvalidRequest
from tests.adapter_folders import BASE, CONFIG, LIMITS, SIDECAR, AdapterHarness, make

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(params=["by O_PATH", "by reopening"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to reach what a link leads to: Linux's, and that of systems without ``O_PATH``."""
    if request.param == "by reopening":
        monkeypatch.setattr(safe_open, "_O_PATH", None)


def snapshot(hub: Path) -> Path:
    """An adapter as a hub's cache holds it: files of a snapshot are links to blobs."""
    repository = hub / "models--org--name"
    blobs, folder = repository / "blobs", repository / "snapshots" / "abc123"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(make(hub.parent, "made").iterdir())):
        file.rename(blobs / f"sha{number}")
        (folder / file.name).symlink_to(f"../../blobs/sha{number}")
    shutil.rmtree(hub.parent / "made")
    return folder


class Volume:
    """A folder as Kubernetes projects a ConfigMap, a Secret or an image into it: names are links through ``..data``."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        path.mkdir(parents=True)

    def put(self, fill: Callable[[Path], object]) -> None:
        """Another generation, in one step; the one before is removed."""
        self.count += 1
        new, before = self.path / f"..2026_11_27_{self.count}", self.path / f"..2026_11_27_{self.count - 1}"
        new.mkdir()
        fill(new)
        (self.path / "..data_tmp").symlink_to(new.name)
        (self.path / "..data_tmp").rename(self.path / "..data")
        for entry in new.iterdir():
            if not (self.path / entry.name).is_symlink():
                (self.path / entry.name).symlink_to(f"..data/{entry.name}")
        shutil.rmtree(before, ignore_errors=True)


def files(alpha: int) -> Callable[[Path], None]:
    """Fills a folder with an adapter's files."""

    def fill(path: Path) -> None:
        made = make(path.parent.parent, ".made", lora_alpha=alpha)
        for file in made.iterdir():
            file.rename(path / file.name)
        made.rmdir()

    return fill


@pytest.mark.usefixtures("either_way")
def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub")
    linked = tmp_path / "adapters" / "a"
    linked.parent.mkdir()
    linked.symlink_to(folder)
    for path in (folder, linked):
        found = read_manifest(path, BASE, replace(LIMITS, roots=(tmp_path / "adapters", tmp_path / "hub")), name="a")
        assert found.weights_digest == read_manifest(make(tmp_path / path.name, "a"), BASE, LIMITS).weights_digest
    with pytest.raises(AdapterRejected, match=r"the folder is a link to '.*/abc123', which leads outside"):
        read_manifest(linked, BASE, replace(LIMITS, roots=(tmp_path / "adapters",)))
    with pytest.raises(AdapterRejected, match=r"adapter_config.json is a link to '../../blobs/sha0', which leads out"):
        read_manifest(folder, BASE, replace(LIMITS, roots=(folder,)))


@pytest.mark.usefixtures("either_way")
def test_a_chain_of_links_is_followed_to_its_end(tmp_path: Path) -> None:
    """One file is here, the other a link to a link to another folder."""
    folder, other = make(tmp_path, "a"), tmp_path / "other"
    other.mkdir()
    (folder / CONFIG_FILE).rename(folder / "mine")
    (folder / CONFIG_FILE).symlink_to("mine")
    (folder / WEIGHTS_FILE).rename(other / "weights")
    (folder / "hop").symlink_to("../other/weights")
    (folder / WEIGHTS_FILE).symlink_to("hop")
    assert read_manifest(folder, BASE, replace(LIMITS, roots=(tmp_path,))).plan.rank == 2


def test_a_template_in_a_hubs_cache_is_as_untrusted_as_one_that_was_fetched(tmp_path: Path) -> None:
    """A sidecar's template is trusted where it is our trainer's; a link into a hub's cache says that it is not."""
    folder = snapshot(tmp_path / "hub")
    (folder / "quickchange.json").write_text(json.dumps(SIDECAR | {"chat_template": "{{ messages }}"}))
    limits = replace(LIMITS, roots=(tmp_path,), trust_chat_templates=False)
    with pytest.raises(AdapterRejected, match="--trust-chat-templates"):
        read_manifest(folder, BASE, limits, name="a")
    found = diagnose(folder, BASE, replace(limits, trust_chat_templates=True), name="a")
    assert (found.problems, found.source["repo_id"], found.source["revision"]) == ([], "org/name", "abc123")


async def test_files_of_a_volume_are_read_and_a_swap_of_its_data_is_a_new_version(tmp_path: Path) -> None:
    """One volume for each adapter: every file is a link through ``..data``."""
    harness = AdapterHarness(tmp_path, roots=(tmp_path / "first",))
    volume = Volume(harness.first / "a")
    volume.put(files(4))
    await harness.watcher.scan()
    before = await harness.use("a")
    volume.put(files(16))
    await harness.watcher.scan()
    after = await harness.use("a")
    assert after != before
    assert harness.registry.get("a").listing.config.alpha == 16
    await harness.watcher.scan()
    assert (await harness.use("a"), harness.loaded) == (after, ["a", "a"])


async def test_folders_and_aliases_of_a_volume_follow_a_swap_of_its_data(tmp_path: Path) -> None:
    """One volume for all adapters: ``a -> ..data/a`` and ``aliases.toml -> ..data/aliases.toml``."""
    (tmp_path / "first").mkdir()
    harness = AdapterHarness(tmp_path, roots=(tmp_path / "first",))
    shutil.rmtree(harness.first)
    volume = Volume(harness.first)

    def generation(alpha: int, alias: str) -> Callable[[Path], None]:
        def fill(path: Path) -> None:
            make(path, "a", lora_alpha=alpha)
            (path / "aliases.toml").write_text(f'{alias} = "a"\n')

        return fill

    volume.put(generation(4, "old"))
    await harness.watcher.scan()
    assert harness.names == ["a"]
    before = await harness.use("old")
    volume.put(generation(16, "new"))
    await harness.watcher.scan()
    assert await harness.use("new") != before
    assert list(harness.adapters.names.aliases) == ["new"]
    assert harness.registry.get("a").listing.path == harness.first / "a"


async def test_a_swap_outside_the_adapter_folder_is_seen_within_the_scan_interval(tmp_path: Path) -> None:
    """The system tells of no events behind a link: the folders were looked at every ten intervals only."""
    harness = AdapterHarness(tmp_path, settle=0.1, roots=(tmp_path,))
    for number in (1, 2):
        make(tmp_path / f"v{number}", "a", lora_alpha=number)
    (tmp_path / "current").symlink_to("v1")
    (harness.first / "a").symlink_to(tmp_path / "current" / "a")
    await asyncio.sleep(0.15)
    await harness.watcher.start()
    before = await harness.use("a")
    watching = asyncio.create_task(harness.watcher.run())
    await asyncio.sleep(0.1)
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").rename(tmp_path / "current")
    try:
        for _ in range(60):
            await asyncio.sleep(0.01)
            if await harness.use("a") != before:
                break
    finally:
        watching.cancel()
    assert harness.registry.get("a").listing.config.alpha == 2


@pytest.mark.usefixtures("either_way")
def test_files_of_two_generations_are_never_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``..data`` is swapped between config and weights: half of one adapter and half of another."""
    read_file = folder_module.read_file_at
    calls: list[int] = []
    volume = Volume(tmp_path / "a")
    volume.put(files(4))

    def read_and_swap(*arguments: Any, **how: Any) -> Any:
        found = read_file(*arguments, **how)
        calls.append(1)
        if len(calls) == 1:
            volume.put(files(16))
        return found

    monkeypatch.setattr(folder_module, "read_file_at", read_and_swap)
    with pytest.raises(OSError, match="links changed while the files were read"):
        read_files(volume.path, max_bytes=100_000, roots=(tmp_path,))
    assert b'"lora_alpha": 16' in read_files(volume.path, max_bytes=100_000, roots=(tmp_path,)).config


async def test_a_swap_while_a_folder_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap at any moment: what is read is one generation, or is not judged."""
    reader = AdapterReader(BASE, replace(LIMITS, roots=(tmp_path,)))
    read_file, left = folder_module.read_file_at, [0]
    volume = Volume(tmp_path / "a")

    def step(*arguments: Any, **how: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            volume.put(files(16))
        return read_file(*arguments, **how)

    monkeypatch.setattr(folder_module, "read_file_at", step)
    for moment in range(1, 8):
        volume.put(files(4))
        left[0] = moment
        with pytest.raises(FolderMoved):
            await reader.manifest(volume.path, folder_state(volume.path, reader.roots), "a")
    reader.close()


async def test_a_swap_while_a_folder_is_listed_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``a -> ..data/a`` was opened, and its generation deleted: files were missing that were there a moment later."""
    harness = AdapterHarness(tmp_path, roots=(tmp_path / "first",))
    harness.first.rmdir()
    volume = Volume(harness.first)
    volume.put(lambda path: make(path, "a", lora_alpha=4))
    read_file = folder_module.read_file_at

    def swap_and_read(*arguments: Any, **how: Any) -> Any:
        monkeypatch.setattr(folder_module, "read_file_at", read_file)
        volume.put(lambda path: make(path, "a", lora_alpha=16))
        return read_file(*arguments, **how)

    monkeypatch.setattr(folder_module, "read_file_at", swap_and_read)
    assert not await harness.watcher.scan()
    assert harness.sync.refusals == {}
    assert await harness.watcher.scan()
    assert (harness.names, harness.registry.get("a").listing.config.alpha) == (["a"], 16)


def leaf(path: Path) -> Path:
    """Something that no adapter may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(CONFIG))
    return path


ESCAPES: dict[str, tuple[Callable[[Path], object], str]] = {
    "to a secret": (lambda root: leaf(root / "secret"), "leads outside"),
    "to /etc/passwd": (lambda root: "/etc/passwd", "leads outside"),
    "above": (lambda root: "../../../../../../../../etc/passwd", "leads outside"),
    "to a folder whose name begins like a root": (lambda root: leaf(root / "adapters-not" / "x"), "leads outside"),
    "through a link inside": (lambda root: chain(root), "leads outside"),
    "through /proc": (lambda root: f"/proc/self/root{leaf(root / 'secret')}", "leads outside"),
    "to this process": (lambda root: "/proc/self/environ", "leads outside"),
    "to a device": (lambda root: "/dev/zero", "leads outside|to what is not a regular file"),
    "to a FIFO inside": (lambda root: fifo(root / "adapters" / "fifo"), "not a regular file"),
    "to a folder inside": (lambda root: root / "adapters", "not a regular file"),
    "to nothing": (lambda root: "nowhere", "which does not exist"),
    "to itself": (lambda root: CONFIG_FILE, "leads in a circle"),
}


def chain(root: Path) -> Path:
    link = root / "adapters" / ".inside"
    link.symlink_to(leaf(root / "secret"))
    return link


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("target", "words"), ESCAPES.values(), ids=ESCAPES)
async def test_a_link_that_leads_elsewhere_is_refused_with_one_sentence_everywhere(
    tmp_path: Path, target: Callable[[Path], object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    harness = AdapterHarness(tmp_path, roots=(tmp_path / "adapters",))
    folder = make(tmp_path / "adapters", "a")
    harness.watcher.folders = (tmp_path / "adapters",)
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).symlink_to(str(target(tmp_path)))
    before = len(os.listdir("/dev/fd"))
    await asyncio.wait_for(harness.watcher.scan(), 5)
    assert len(os.listdir("/dev/fd")) <= before + 1  # the reader's thread may have one of its own
    sentence = harness.sync.refusals["a"][1]
    assert sentence.startswith(f"{CONFIG_FILE} is a link to ")
    assert any(word in sentence for word in words.split("|"))
    assert caplog.messages == [f"adapter folder a is not served: {sentence}"]
    assert diagnose(folder, BASE, replace(LIMITS, roots=(tmp_path / "adapters",))).problems == [sentence]
    assert harness.metrics.registry.get_sample_value("quickchange_adapter_rejections_total") == 1
    assert (harness.names, "alpha" in sentence) == ([], False)


async def test_a_linked_folder_that_leads_outside_is_refused_once_whatever_happens_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was left out without a word; what lies outside is neither listed nor watched."""
    harness = AdapterHarness(tmp_path, roots=(tmp_path / "first",))
    outside = make(tmp_path, "outside")
    (harness.first / "a").symlink_to(outside)
    (harness.first / "b").symlink_to("b")
    for number in range(3):
        await harness.watcher.scan()
        (outside / f"file{number}").write_text("new")
    assert harness.names == []
    assert sorted(line.split(":")[0] for line in caplog.messages) == [
        "adapter folder a is not served", "adapter folder b is not served",
    ]  # fmt: skip
    assert "leads outside" in harness.sync.refusals["a"][1]
    assert "leads in a circle" in harness.sync.refusals["b"][1]
    assert not harness.watcher._watchable


@pytest.mark.usefixtures("either_way")
def test_a_link_moved_after_it_was_judged_is_read_as_it_was_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judge a path, then open it: a link exchanged in between reads what nobody judged."""
    folder, secret = make(tmp_path / "adapters", "a"), leaf(tmp_path / "secret")
    (folder / CONFIG_FILE).rename(folder / "mine")
    (folder / CONFIG_FILE).symlink_to("mine")
    secret.write_text("a secret")
    judge = safe_open.path_of

    def judge_and_exchange(descriptor: int) -> str | None:
        where = judge(descriptor)
        if where is not None and where.endswith("/mine"):
            (folder / CONFIG_FILE).unlink()
            (folder / CONFIG_FILE).symlink_to(secret)
        return where

    monkeypatch.setattr(safe_open, "path_of", judge_and_exchange)
    found = read_file(folder / CONFIG_FILE, 100_000, (tmp_path / "adapters",))
    assert json.loads(found or b"") == CONFIG
    with pytest.raises(ValueError, match="leads outside"):
        read_file(folder / CONFIG_FILE, 100_000, (tmp_path / "adapters",))


def test_where_the_system_does_not_tell_where_a_link_leads_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, "a")
    limits = replace(LIMITS, roots=(tmp_path,))
    monkeypatch.setattr(safe_open, "path_of", lambda descriptor: None)
    assert read_manifest(folder, BASE, limits).name == "a"
    (folder / CONFIG_FILE).rename(folder / "mine")
    (folder / CONFIG_FILE).symlink_to("mine")
    with pytest.raises(AdapterRejected, match="leads outside"):
        read_manifest(folder, BASE, limits)


async def test_an_adapter_folder_that_is_a_link_is_read_and_followed_when_it_is_moved(tmp_path: Path) -> None:
    """``adapters -> releases/2``, as deployments move it."""
    for number in (1, 2):
        make(tmp_path / "releases" / str(number), "a", lora_alpha=number)
    harness = AdapterHarness(tmp_path)
    harness.first.rmdir()
    harness.first.symlink_to("releases/1")
    await harness.watcher.scan()
    before = await harness.use("a")
    assert (await harness.operator.load("b", "a", in_place=False)).name == "b"
    harness.first.unlink()
    harness.first.symlink_to("releases/2")
    await harness.watcher.scan()
    assert await harness.use("a") != before
    assert harness.watcher._linked


async def test_a_linked_folder_can_be_loaded_by_its_path_and_deleted_alone(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, roots=(tmp_path / "store",))
    target = make(tmp_path / "store", "a")
    (harness.first / "a").symlink_to(target)
    (harness.first / "out").symlink_to(make(tmp_path, "outside"))
    await harness.watcher.scan()
    assert (await harness.operator.load("b", "a", in_place=False)).name == "b"
    with pytest.raises(InvalidRequest, match="lora_path"):
        await harness.operator.load("c", "out", in_place=False)
    await harness.operator.delete("a")
    assert (os.path.lexists(harness.first / "a"), (target / CONFIG_FILE).is_file()) == (False, True)
    assert [name for name in os.listdir(harness.first) if name != "out"] == []
