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
from tests.adapter_folders import CONFIG, Shelf, make, write
from tests.fakes import FakeEngine, server_state


async def answers(shelf: Shelf, model: str) -> list[Mapping[str, Any]]:
    """What is said of a model by its details, a chat and a completion; each is a 404."""
    app = create_app(replace(server_state(FakeEngine()), adapters=shelf.lender))
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
    shelf = Shelf(tmp_path)
    make(shelf.first, "broken", peft_type="LOHA")
    await shelf.watcher.scan()
    _, reason = shelf.intake.refusals["broken"]
    for error in await answers(shelf, "broken"):
        assert error["message"] == f"The adapter `broken` is not served: {reason}"
    with pytest.raises(ModelNotFound, match=r"`broken` is not served: adapter_config.json: peft_type is 'LOHA'"):
        await shelf.lender.acquire("broken:0.5")
    for error in await answers(shelf, "nobody"):
        assert error["message"] == "The model `nobody` does not exist or you do not have access to it."


async def test_an_adapter_whose_folder_name_is_no_model_name_is_not_found_with_the_reason(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    make(shelf.first, "my adapter")
    await shelf.watcher.scan()
    for error in await answers(shelf, "my adapter"):
        assert "is not served: the folder's name is no model name" in error["message"]


async def test_an_adapter_refused_when_it_is_loaded_is_not_found_with_the_reason(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    make(shelf.first, "unloadable")
    await shelf.watcher.scan()
    with pytest.raises(ModelNotFound, match=r"The adapter `unloadable` is not served: no$"):
        await shelf.lender.acquire("unloadable")


async def test_a_refused_adapter_that_is_mended_or_gone_is_no_longer_told_of(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    mended, gone = make(shelf.first, "mended", peft_type="LOHA"), make(shelf.first, "gone", peft_type="LOHA")
    await shelf.watcher.scan()
    write(mended, config=CONFIG)
    gone.rename(shelf.first / ".gone")
    for _ in range(2):
        await shelf.watcher.scan()
    assert await shelf.use("mended")
    for error in await answers(shelf, "gone"):
        assert "does not exist" in error["message"]


async def test_no_client_is_told_where_the_files_of_the_server_are(tmp_path: Path) -> None:
    """Where a link leads stands in the log's sentence."""
    shelf = Shelf(tmp_path)
    secret = make(tmp_path, "a secret's place")
    (shelf.first / "linked").symlink_to(secret)
    deep = tmp_path / ("deep " * 40) / ("deeper " * 20)
    (shelf.first / "deep").symlink_to(deep)
    make(shelf.first, "inside")
    (shelf.first / "inside/adapter_config.json").unlink()
    (shelf.first / "inside/adapter_config.json").symlink_to(secret / "adapter_config.json")
    deep.mkdir(parents=True)
    await shelf.watcher.scan()
    assert len(shelf.intake.refusals) == 3
    for name, (_, reason) in shelf.intake.refusals.items():
        assert str(tmp_path) in reason
        for error in await answers(shelf, name):
            assert str(tmp_path) not in error["message"] and "secret" not in error["message"]
            assert "deep " not in error["message"].removeprefix("The adapter `deep ")
            assert "(a path on the server), which leads outside" in error["message"]


async def test_the_details_of_an_adapter_hold_no_path_of_the_server(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    path = make(shelf.first, "a")
    await shelf.watcher.scan()
    await shelf.use("a")
    (path / "adapter_config.json").unlink()
    (path / "adapter_config.json").symlink_to("/etc/hostname")
    await shelf.watcher.scan()
    app = create_app(replace(server_state(FakeEngine()), adapters=shelf.lender))
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
