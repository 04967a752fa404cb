"""A request's ``model`` means exactly one version of each adapter it names, and that version stays until its end."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

import pytest

from server.adapters import adapter_library as module
from server.adapters.versions import Pin
from server.errors import AdapterPending, InvalidRequest, ModelNotFound, QueueFull
from tests.adapter_folders import CONFIG, SIDECAR, AdapterHarness, make, tensors, write


@pytest.fixture
async def harness(tmp_path: Path) -> AdapterHarness:
    return AdapterHarness(tmp_path)


@pytest.fixture
async def kept(tmp_path: Path) -> AdapterHarness:
    """A harness with a state directory."""
    return AdapterHarness(tmp_path, state=True)


async def replace(harness: AdapterHarness, name: str, **config: object) -> None:
    write(harness.first / name, config=CONFIG | config)
    await harness.watcher.scan()


async def test_an_unknown_name_is_not_found(harness: AdapterHarness) -> None:
    with pytest.raises(ModelNotFound, match="`ghost`"):
        await harness.adapters.acquire("ghost")


async def test_a_listed_adapter_is_hashed_and_loaded_when_it_is_asked_for(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    assert (harness.registry.get("a").current, harness.loaded) == (None, [])
    lease = await harness.adapters.acquire("a")
    assert harness.loaded == ["a"]
    assert lease.label == f"a@{(await harness.version('a'))[:12]}"


async def test_names_with_equal_bytes_share_memory(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    write(make(harness.first, "b"), sidecar=SIDECAR)
    await harness.watcher.scan()
    await harness.use("a")
    await harness.use("b")
    assert harness.loaded == ["a"]
    assert await harness.version("a") != await harness.version("b")
    shutil.rmtree(harness.first / "a")
    await harness.watcher.scan()
    assert harness.freed == []
    shutil.rmtree(harness.first / "b")
    await harness.watcher.scan()
    assert len(harness.freed) == 1


async def test_a_request_keeps_its_version_while_its_name_moves(kept: AdapterHarness) -> None:
    make(kept.first, "a")
    await kept.watcher.scan()
    old = await kept.adapters.acquire("a")
    await replace(kept, "a", lora_alpha=16)
    assert kept.freed == []
    assert await kept.use("a") != old.label
    old.release()
    assert kept.freed == [old.adapters[0].adapter.weights_digest]
    kept.cache.check_integrity()


async def test_a_replaced_version_can_still_be_asked_for(kept: AdapterHarness) -> None:
    make(kept.first, "a")
    await kept.watcher.scan()
    old = await kept.use("a")
    await replace(kept, "a", lora_alpha=16)
    assert await kept.use(old) == old
    assert await kept.use(old[:7]) == old


async def test_a_version_is_there_after_a_restart_and_after_its_folder(kept: AdapterHarness, tmp_path: Path) -> None:
    make(kept.first, "a")
    await kept.watcher.scan()
    old = await kept.use("a")
    await replace(kept, "a", lora_alpha=16)
    again = AdapterHarness(tmp_path, state=True)
    await again.watcher.start()
    assert await again.use(old) == old
    shutil.rmtree(again.first / "a")
    await again.watcher.scan()
    assert await again.use(old) == old
    with pytest.raises(ModelNotFound):
        await again.use("a")


async def test_what_was_hashed_before_a_restart_is_known_at_once(kept: AdapterHarness, tmp_path: Path) -> None:
    make(kept.first, "a")
    await kept.watcher.scan()
    version = await kept.version("a")
    await kept.reader.save_digests()
    again = AdapterHarness(tmp_path, state=True)
    await again.watcher.start()
    current = again.registry.get("a").current
    assert current is not None
    assert current.version_digest == version


async def test_noted_digests_that_lie_are_found_out_when_the_bytes_are_read(
    kept: AdapterHarness, tmp_path: Path
) -> None:
    """Nothing is served before its bytes were hashed, whatever was noted about them."""
    make(kept.first, "a")
    make(kept.first, "b", lora_alpha=16)
    await kept.watcher.scan()
    versions = {name: await kept.version(name) for name in "ab"}
    await kept.reader.save_digests()
    assert kept.store is not None
    digests = kept.store.load_digests()
    a, b = str(kept.first / "a"), str(kept.first / "b")
    swapped = digests[b].__class__(digests[a].state, digests[b].weights_digest, digests[b].version_digest)
    kept.store.save_digests({**digests, a: swapped})
    again = AdapterHarness(tmp_path, state=True)
    await again.watcher.start()
    assert await again.use("a") == f"a@{versions['a'][:12]}"


async def test_without_a_state_directory_a_version_lives_as_long_as_it_is_in_memory(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, room=2)
    make(harness.first, "a")
    make(harness.first, "b", lora_alpha=32)
    make(harness.first, "c", lora_alpha=64)
    await harness.watcher.scan()
    old = await harness.use("a")
    await replace(harness, "a", lora_alpha=16)
    assert await harness.use(old) == old
    await harness.use("b")
    await harness.use("c")
    with pytest.raises(ModelNotFound):
        await harness.use(old)
    assert await harness.use("a") != old


async def test_a_version_that_two_begin_like_is_asked_for_in_full(
    harness: AdapterHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    await harness.use("a")
    entry = harness.registry.get("a")
    assert entry.current is not None
    twin = entry.current.version_digest[:10] + "0" * 54
    entry.older[twin] = entry.current.__class__(**{**vars(entry.current), "version_digest": twin})
    with pytest.raises(InvalidRequest, match="give more digits"):
        await harness.use(f"a@{twin[:6]}")


async def test_a_pin_holds_a_name_at_a_version(kept: AdapterHarness) -> None:
    make(kept.first, "a")
    await kept.watcher.scan()
    old = await kept.adapters.acquire("a")
    old.release()
    assert kept.store is not None
    kept.store.set_pin("a", Pin(old.adapters[0].adapter.version_digest))
    await replace(kept, "a", lora_alpha=16)
    assert await kept.use("a") == old.label
    kept.store.set_pin("a", Pin())
    await kept.watcher.scan()
    assert await kept.use("a") != old.label


async def test_a_pin_in_memory_keeps_an_adapter_there(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, room=2)
    for number, name in enumerate("abc"):
        make(harness.first, name, lora_alpha=8 + number)
    await harness.watcher.scan()
    harness.adapters.set_pins({"a": Pin(resident=True)})
    while not harness.cache.pinned:
        await asyncio.sleep(0.01)
    for name in "bcbc":
        await harness.use(name)
    assert harness.loaded == ["a", "b", "c", "b", "c"]
    await replace(harness, "a", lora_alpha=32)
    while harness.loaded.count("a") < 2:
        await asyncio.sleep(0.01)


async def test_an_exact_name_wins_over_an_alias_and_an_alias_over_the_grammar(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    make(harness.first, "b", lora_alpha=16)
    make(harness.first, "c", lora_alpha=32)
    (harness.first / "aliases.toml").write_text('a = "b"\nnice = "b"\nboth = "c:0.5+b"\n')
    await harness.watcher.scan()
    assert (await harness.use("a")).startswith("a@")
    assert (await harness.use("nice")).startswith("b@")
    assert await harness.use("both") == f"{await harness.use('c')}:0.5+{await harness.use('b')}"


async def test_a_canary_is_sticky_by_user(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    make(harness.first, "b", lora_alpha=16)
    (harness.first / "aliases.toml").write_text('support = {"a" = 0.5, "b" = 0.5}\n')
    await harness.watcher.scan()
    seen = {}
    for user in (f"user-{number}" for number in range(20)):
        labels = set()
        for _ in range(3):
            lease = await harness.adapters.acquire("support", user=user)
            labels.add(lease.label)
            lease.release()
        assert len(labels) == 1
        seen[user] = labels.pop()
    assert len(set(seen.values())) == 2


async def test_a_composition_has_the_first_ones_manners_and_every_ones_end(harness: AdapterHarness) -> None:
    write(make(harness.first, "a"), sidecar=SIDECAR | {"system_prompt": "A"})
    write(make(harness.first, "b", lora_alpha=16), sidecar=SIDECAR | {"system_prompt": "B", "stop": ["END"]})
    await harness.watcher.scan()
    lease = await harness.adapters.acquire("a:0.7+b:-0.3")
    assert [use.scale for use in lease.uses] == [0.7, -0.3]
    assert (lease.defaults.system_prompt, lease.defaults.stop) == ("A", ("###", "END"))
    assert lease.metrics_label == "_composition"


async def test_lora_scale_is_the_factor_of_one_adapter(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    lease = await harness.adapters.acquire("a", scale=0.5)
    assert [use.scale for use in lease.uses] == [0.5]
    with pytest.raises(InvalidRequest, match="lora_scale"):
        await harness.adapters.acquire("a:0.5", scale=0.5)


async def test_only_plain_lora_is_scaled_or_added_up(harness: AdapterHarness) -> None:
    weights = tensors() | {
        "base_model.model.model.layers.0.q_proj.lora_magnitude_vector": tensors().popitem()[1].new_ones(4),
        "base_model.model.model.layers.0.v_proj.lora_magnitude_vector": tensors().popitem()[1].new_ones(2),
    }
    write(make(harness.first, "dora", use_dora=True), weights=weights)
    await harness.watcher.scan()
    await harness.use("dora")
    with pytest.raises(InvalidRequest, match="cannot be scaled or added"):
        await harness.adapters.acquire("dora:0.5")


async def test_a_request_waits_for_a_folder_that_is_just_being_changed(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    old = await harness.version("a")
    write(harness.first / "a", config=CONFIG | {"lora_alpha": 16})
    waiting = asyncio.ensure_future(harness.use("a"))
    await asyncio.sleep(0.15)
    assert not waiting.done()
    await harness.watcher.scan()
    assert await waiting != f"a@{old[:12]}"


async def test_a_folder_overwritten_before_it_was_loaded_is_served_as_kept(kept: AdapterHarness) -> None:
    make(kept.first, "a")
    await kept.watcher.scan()
    label = f"a@{(await kept.version('a'))[:12]}"
    os.truncate(kept.first / "a" / "adapter_model.safetensors", 10)
    assert await kept.use("a") == label
    await kept.watcher.scan()
    assert await kept.use("a") == label


async def test_a_folder_that_is_broken_at_a_restart_is_served_as_kept(kept: AdapterHarness, tmp_path: Path) -> None:
    """Its name was a 404 after a restart once, even where it was pinned to a version that was kept."""
    make(kept.first, "a")
    await kept.watcher.scan()
    label = await kept.use("a")
    os.truncate(kept.first / "a" / "adapter_model.safetensors", 10)
    again = AdapterHarness(tmp_path, state=True)
    await again.watcher.start()
    assert await again.use("a") == label
    assert "truncated" in str(again.registry.get("a").refused)
    write(again.first / "a", weights=tensors(), config=CONFIG | {"lora_alpha": 16})
    await again.watcher.scan()
    assert await again.use("a") != label


async def test_a_folder_broken_before_it_was_loaded_is_not_found(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    await harness.version("a")
    os.truncate(harness.first / "a" / "adapter_model.safetensors", 10)
    await harness.watcher.scan()
    with pytest.raises(ModelNotFound):
        await harness.use("a")
    assert harness.names == []


async def test_weights_that_do_not_load_are_a_refusal(harness: AdapterHarness) -> None:
    make(harness.first, "unloadable")
    await harness.watcher.scan()
    with pytest.raises(ModelNotFound):
        await harness.use("unloadable")
    assert harness.names == []
    assert harness.sync.refusals["unloadable"][1] == "no"


async def test_a_kept_version_whose_bytes_changed_is_not_served(kept: AdapterHarness) -> None:
    make(kept.first, "a")
    await kept.watcher.scan()
    old = await kept.adapters.acquire("a")
    old.release()
    await replace(kept, "a", lora_alpha=16)
    assert kept.store is not None
    folder = kept.store.folder(old.adapters[0].adapter.version_digest)
    assert folder is not None
    write(folder, config=CONFIG | {"lora_alpha": 3})
    with pytest.raises(ModelNotFound):
        await kept.use(old.label)


async def test_as_many_may_wait_for_room_as_the_queue_is_long(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, room=1)
    make(harness.first, "a")
    make(harness.first, "b", lora_alpha=16)
    await harness.watcher.scan()
    lease = await harness.adapters.acquire("a")
    waiting = [asyncio.ensure_future(harness.use("b")) for _ in range(8)]
    while len(harness.cache._queue) < 8:
        await asyncio.sleep(0.01)
    with pytest.raises(QueueFull):
        await harness.adapters.acquire("b")
    lease.release()
    await asyncio.gather(*waiting)


async def test_a_composition_that_cannot_fit_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, room=1)
    make(harness.first, "a")
    make(harness.first, "b", lora_alpha=16)
    await harness.watcher.scan()
    with pytest.raises(InvalidRequest, match="do not fit"):
        await harness.adapters.acquire("a+b")


async def test_a_folder_that_never_settles_is_not_waited_for_for_ever(
    harness: AdapterHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a 404, as if there were no such adapter; it is one that is to be asked for again."""
    monkeypatch.setattr(module, "READ_TIMEOUT", 0.2)
    make(harness.first, "a")
    await harness.watcher.scan()
    write(harness.first / "a", config=CONFIG | {"lora_alpha": 16})
    with pytest.raises(AdapterPending, match="Try again"):
        await harness.use("a")


async def test_hundreds_of_adapters_that_come_and_go_leave_nothing(harness: AdapterHarness) -> None:
    series = len(next(iter(harness.metrics.registry.collect())).samples)
    for number in range(300):
        path = make(harness.first, f"a{number}", lora_alpha=1 + number)
        await harness.watcher.scan()
        await harness.use(path.name)
        shutil.rmtree(path)
        await harness.watcher.scan()
    assert (len(harness.loaded), len(harness.freed)) == (300, 300)
    assert harness.cache.num_bytes == 0
    assert not harness.registry._names_of_weights
    assert not harness.adapters._loaded
    assert len(next(iter(harness.metrics.registry.collect())).samples) == series


async def test_a_name_is_not_lost_because_another_with_its_bytes_cannot_be_read(harness: AdapterHarness) -> None:
    """A load is shared by content: whoever joined one that failed got the other name's 404."""
    make(harness.first, "a")
    make(harness.first, "b")
    await harness.watcher.scan()
    assert await harness.version("a") == await harness.version("b")
    shutil.rmtree(harness.first / "a")
    first, second = asyncio.ensure_future(harness.use("a")), asyncio.ensure_future(harness.use("b"))
    await asyncio.sleep(0)
    await harness.watcher.scan()
    with pytest.raises(ModelNotFound):
        await first
    assert (await second).startswith("b@")


@pytest.mark.parametrize("pinned", [False, True])
async def test_an_older_version_in_use_is_read_once(kept: AdapterHarness, pinned: bool) -> None:
    """It was freed after each request, because nobody had wanted it for a moment."""
    make(kept.first, "a")
    await kept.watcher.scan()
    old = await kept.use("a")
    await replace(kept, "a", lora_alpha=16)
    await kept.use("a")
    if pinned:
        await kept.operator.rollback("a")
    kept.loaded.clear()
    for _ in range(5):
        assert await kept.use("a" if pinned else old) == old
    assert len(kept.loaded) <= 1


async def test_a_version_held_in_memory_only_stays_there(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path, room=1)
    make(harness.first, "a")
    make(harness.first, "b", lora_alpha=32)
    await harness.watcher.scan()
    old = await harness.use("a")
    await harness.operator.pin("a", old.partition("@")[2])
    await replace(harness, "a", lora_alpha=16)
    await harness.use("b")
    assert await harness.use("a") == old


async def test_a_folder_with_the_bytes_of_the_one_it_follows_is_where_they_are(tmp_path: Path) -> None:
    """A demo adapter behind a removed copy of itself was looked for where the copy had been."""
    harness = AdapterHarness(tmp_path, room=1)
    make(harness.first, "a")
    make(harness.second, "a")
    make(harness.first, "b", lora_alpha=16)
    await harness.watcher.scan()
    label = await harness.use("a")
    shutil.rmtree(harness.first / "a")
    await harness.watcher.scan()
    await harness.use("b")
    assert await asyncio.wait_for(harness.use("a"), 5) == label


async def test_weights_pinned_in_memory_go_with_their_folder(harness: AdapterHarness) -> None:
    make(harness.first, "a")
    await harness.watcher.scan()
    await harness.operator.pin("a", None)
    await harness.use("a")
    await replace(harness, "a", lora_alpha=16)
    await harness.use("a")
    shutil.rmtree(harness.first / "a")
    await harness.watcher.scan()
    assert (harness.cache.num_bytes, harness.cache.pinned) == (0, frozenset())


async def test_an_error_of_the_system_is_no_verdict(
    harness: AdapterHarness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder seen while the process had no descriptor to spare was refused until somebody touched it. Then it was
    tried again without a word, for as long as the trouble lasted."""
    make(harness.first, "a")

    def exhausted(*arguments: object, **named: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("server.adapters.content.folder.os.open", exhausted)
        assert not await harness.watcher.scan()
        assert not await harness.watcher.scan()
    assert harness.sync.refusals == {}
    assert caplog.messages == ["adapter folder a cannot be read just now: Too many open files; trying again"]
    await harness.watcher.scan()
    assert (await harness.use("a")).startswith("a@")
