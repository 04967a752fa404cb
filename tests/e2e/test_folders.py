"""What happens in the adapter folder of a running server."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.serving import ServerProcess


def ask(client: OpenAI, model: str) -> str | None:
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "How do I sort a list?"}], temperature=0, max_tokens=30
    )
    return completion.choices[0].message.content


def test_a_folder_that_appears_is_served_and_one_that_goes_is_gone(
    client: OpenAI, server: ServerProcess, watched: Path
) -> None:
    shutil.copytree(watched / "helpdesk", watched / "newcomer")
    server.until("the new adapter is listed", lambda: "newcomer" in server.models())
    assert ask(client, "newcomer") == ask(client, "helpdesk")
    assert server.metric("quickchange_requests_total", adapter="newcomer", finish_reason="length") == 1
    shutil.rmtree(watched / "newcomer")
    server.until("the adapter is gone", lambda: "newcomer" not in server.models())
    with pytest.raises(openai.NotFoundError):
        ask(client, "newcomer")


def _truncate(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 5000)


def _pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _for_another_base(folder: Path) -> None:
    sidecar = json.loads((folder / "quickchange.json").read_text())
    sidecar["base"] = {"name": "other", "fingerprint": "sha256:" + "0" * 64}
    (folder / "quickchange.json").write_text(json.dumps(sidecar))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_truncate, "truncated"),
        (_pickle_only, "the weights are a pickle"),
        (_for_another_base, "trained on another base (other"),
    ],
)
def test_a_broken_folder_is_reported_and_disturbs_nobody(
    client: OpenAI, server: ServerProcess, watched: Path, spoil: object, words: str
) -> None:
    before, listed = ask(client, "helpdesk"), server.models()
    hidden = watched / ".broken"
    shutil.copytree(watched / "helpdesk", hidden)
    assert callable(spoil)
    spoil(hidden)
    hidden.rename(watched / "broken")
    already = len(server.log)
    server.until("the refusal is logged", lambda: any(words in line for line in server.log[already:]))
    assert server.models() == listed
    assert ask(client, "helpdesk") == before
    shutil.rmtree(watched / "broken")
    server.until("the folder is forgotten", lambda: server.metric("quickchange_adapters_loaded") == len(listed) - 1)
