"""``/`` shows what runs here with commands that work; no page needs another host, and no name is markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from server.adapters.aliases import parse_aliases
from server.api.app import create_app
from server.api.auth.access import Access
from server.api.auth.keys import ApiKey, KeyRing, digest_of
from server.api.auth.principal import AccessScope, Principal
from server.api.pages.overview import MAX_ROWS
from server.api.pages.reference import MEDIA_TYPES
from server.api.state import ServerState
from tests.fakes import FakeEngine, adapter, ask, server_state

ASSETS = Path(__file__).parents[2] / "server" / "api" / "pages" / "assets"
PAGES = ("/", "/docs", "/redoc")
EVIL = """<script>alert('x')</script>"&"""


def state_with_aliases() -> ServerState:
    state = server_state(FakeEngine(), adapter("poet"), adapter("clerk"))
    state.adapters.set_aliases(parse_aliases(f"{json.dumps(EVIL)} = 'poet'\nsupport = 'clerk'".encode()))
    return state


def commands(reply: httpx.Response) -> list[list[str]]:
    found = re.findall(r"<pre><code>(.*?)</code></pre>", reply.text, re.DOTALL)
    return [shlex.split(html.unescape(command)) for command in found]


def test_the_page_shows_base_adapters_versions_aliases_and_context() -> None:
    text = ask(create_app(state_with_aliases()), "GET", "/").text
    for shown in ("<code>micro</code>", "256 tokens", "<code>poet</code>", "poet-version", "clerk", "support", "ready"):
        assert shown in text
    for link in ("docs", "redoc", "openapi.json", "v1/models", "metrics"):
        assert f'<a href="{link}">' in text


def test_its_commands_work() -> None:
    app = create_app(state_with_aliases())
    found = commands(ask(app, "GET", "/"))
    assert len(found) == 3
    for program, url, *options in found:
        assert program == "curl"
        headers = dict(value.split(": ") for flag, value in pairwise(options) if flag == "-H")
        content = next((value for flag, value in pairwise(options) if flag == "-d"), None)
        reply = ask(app, "GET" if content is None else "POST", url, content=content, headers=headers)
        assert reply.status_code == 200


def test_names_are_text_not_markup() -> None:
    text = ask(create_app(state_with_aliases()), "GET", "/").text
    assert html.escape(EVIL) in text
    assert "<script" not in text


@pytest.mark.parametrize("path", PAGES)
def test_a_page_needs_no_other_host_and_forbids_it(path: str) -> None:
    reply = ask(create_app(state_with_aliases()), "GET", path)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", reply.text)
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=", reply.text)
    for style in re.findall(r"<style>(.*?)</style>", reply.text, re.DOTALL):
        assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy


def test_scripts_and_styles_are_served_compressed_or_not() -> None:
    app = create_app(state_with_aliases())
    for name, media_type in MEDIA_TYPES.items():
        plain = ask(app, "GET", f"/assets/{name}", headers={"accept-encoding": "identity"})
        packed = ask(app, "GET", f"/assets/{name}")
        assert packed.content == plain.content
        assert "content-encoding" not in plain.headers
        assert plain.headers["content-type"].startswith(media_type)
        digest = hashlib.sha256(plain.content).hexdigest()
        assert name == "swagger-start.js" or digest in (ASSETS / "README.md").read_text()
    for missing in ("README.md", "..%2Foverview.py", "swagger-ui.css.gz"):
        assert ask(app, "GET", f"/assets/{missing}").status_code == 404


def test_every_script_of_a_page_is_there() -> None:
    app = create_app(state_with_aliases())
    for page in ("/docs", "/redoc"):
        for asset in re.findall(r"""(?:src|href)="(.*?)\"""", ask(app, "GET", page).text):
            assert ask(app, "GET", f"/{asset}").status_code == 200


def test_a_request_without_a_key_sees_no_model() -> None:
    key = ApiKey(digest_of("key"), Principal("key", "key", frozenset({AccessScope.INFER}), frozenset({"poet"})))
    app = create_app(replace(state_with_aliases(), access=Access(KeyRing((key,), is_open=False))))
    text = ask(app, "GET", "/").text
    assert not any(name in text for name in ("micro", "poet", "clerk", "support"))
    own = ask(app, "GET", "/", headers={"authorization": "Bearer key"})
    assert "poet" in own.text and "clerk" not in own.text
    assert all("Authorization: Bearer $API_KEY" in command for command in commands(own))


def test_thousands_of_adapters_are_not_all_shown() -> None:
    state = server_state(FakeEngine(), *(adapter(f"adapter-{number:04}") for number in range(MAX_ROWS + 50)))
    text = ask(create_app(state), "GET", "/").text
    assert text.count("<tr><td>") == MAX_ROWS
    assert "51 more are in" in text
