"""Who asks for an adapter whose folder was refused is told why, and nothing of where the server's files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.errors import ModelNotFound, without_paths
from tests.adapter_folders import CONFIG, AdapterHarness, make, write
from tests.fakes import FakeEngine, server_state


async def answers(harness: AdapterHarness, model: str) -> list[Mapping[str, Any]]:
    """What is said of a model by its details, a chat and a completion; each is a 404."""
    app = create_app(replace(server_state(FakeEngine()), adapters=harness.adapters))
    chat = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        replies = [
            await client.get(f"/v1/models/{model}"),
            await client.post("/v1/chat/completions", json=chat),
            await client.post("/v1/completions", json={"model": model, "prompt": "hello"}),
        ]
    assert [reply.status_code for reply in replies] == [404, 404, 404]
    errors = [reply.json()["error"] for reply in replies]
    assert {error["code"] for error in errors} == {"model_not_found"}
    return errors


async def test_an_adapter_that_was_refused_is_not_found_with_the_reason(tmp_path: Path) -> None:
    """It was said not to exist; the reason was in the server's log alone."""
    harness = AdapterHarness(tmp_path)
    make(harness.first, "broken", peft_type="LOHA")
    await harness.watcher.scan()
    _, reason = harness.sync.refusals["broken"]
    for error in await answers(harness, "broken"):
        assert error["message"] == f"The adapter `broken` is not served: {reason}"
    with pytest.raises(ModelNotFound, match=r"`broken` is not served: adapter_config.json: peft_type is 'LOHA'"):
        await harness.adapters.acquire("broken:0.5")
    for error in await answers(harness, "nobody"):
        assert error["message"] == (
            "The model `nobody` does not exist or you do not have access to it. Nearest: `base`."
        )


async def test_an_adapter_whose_folder_name_is_no_model_name_is_not_found_with_the_reason(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path)
    make(harness.first, "my adapter")
    await harness.watcher.scan()
    for error in await answers(harness, "my adapter"):
        assert "is not served: the folder's name is no model name" in error["message"]


async def test_an_adapter_refused_when_it_is_loaded_is_not_found_with_the_reason(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path)
    make(harness.first, "unloadable")
    await harness.watcher.scan()
    with pytest.raises(ModelNotFound, match=r"The adapter `unloadable` is not served: no$"):
        await harness.adapters.acquire("unloadable")


async def test_a_refused_adapter_that_is_mended_or_gone_is_no_longer_told_of(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path)
    mended, gone = make(harness.first, "mended", peft_type="LOHA"), make(harness.first, "gone", peft_type="LOHA")
    await harness.watcher.scan()
    write(mended, config=CONFIG)
    gone.rename(harness.first / ".gone")
    for _ in range(2):
        await harness.watcher.scan()
    assert await harness.use("mended")
    for error in await answers(harness, "gone"):
        assert "does not exist" in error["message"]


async def test_no_client_is_told_where_the_files_of_the_server_are(tmp_path: Path) -> None:
    """Where a link leads stands in the log's sentence."""
    harness = AdapterHarness(tmp_path)
    secret = make(tmp_path, "a secret's place")
    (harness.first / "linked").symlink_to(secret)
    deep = tmp_path / ("deep " * 40) / ("deeper " * 20)
    (harness.first / "deep").symlink_to(deep)
    make(harness.first, "inside")
    (harness.first / "inside/adapter_config.json").unlink()
    (harness.first / "inside/adapter_config.json").symlink_to(secret / "adapter_config.json")
    deep.mkdir(parents=True)
    await harness.watcher.scan()
    assert len(harness.sync.refusals) == 3
    for name, (_, reason) in harness.sync.refusals.items():
        assert str(tmp_path) in reason
        for error in await answers(harness, name):
            assert str(tmp_path) not in error["message"] and "secret" not in error["message"]
            assert "deep " not in error["message"].removeprefix("The adapter `deep ")
            assert "(a path on the server), which leads outside" in error["message"]


async def test_the_details_of_an_adapter_hold_no_path_of_the_server(tmp_path: Path) -> None:
    harness = AdapterHarness(tmp_path)
    path = make(harness.first, "a")
    await harness.watcher.scan()
    await harness.use("a")
    (path / "adapter_config.json").unlink()
    (path / "adapter_config.json").symlink_to("/etc/hostname")
    await harness.watcher.scan()
    app = create_app(replace(server_state(FakeEngine()), adapters=harness.adapters))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        refused = (await client.get("/v1/models/a")).json()["refused"]
    assert "leads outside" in refused and "/etc" not in refused


@pytest.mark.parametrize(
    "sentence",
    [
        "serve it with --base-model, or save the adapter and/or its parts",
        "the adapter is in snapshots/abc: copy it with cp -rL",
        "its token '</tool>' has the id 7",
        "see https://example.org/a/b",
        "it's 3 / 4 of them",
    ],
)
def test_what_is_no_absolute_path_stays(sentence: str) -> None:
    assert without_paths(sentence) == sentence


@pytest.mark.parametrize(
    "path", ["/srv/a", "'/srv/a b/c'", '"/srv/it\'s"', "(/srv/a)", "'/" + "x " * 99, "[Errno 2] No file: '/srv/a'"]
)
def test_an_absolute_path_is_left_out(path: str) -> None:
    said = without_paths(f"it is in {path}, which is not there")
    assert "srv" not in said and "x x" not in said
    assert said.endswith(", which is not there")
