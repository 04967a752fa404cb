"""Web pages: which origins may use the API, which host names it answers under, and what a server may start with."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.api.app import create_app
from server.api.auth.access import Access
from server.api.hosts import allowed_hosts, host_name
from server.api.middleware import MAX_BODY_BYTES
from server.cli.access import build_access
from server.cli.listening import bound_sockets
from server.cli.tls import check_certificate
from server.errors import SettingsError
from server.settings import Settings
from tests.fakes import BASE, FakeEngine, adapter, ask, server_state

CHAT = "/v1/chat/completions"
ONE = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
PAGE = "https://app.example.com"
OTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgpUGj32pAYc+4EnUA
um/fVbxdL0QykF86aKHjtkKejn2hRANCAAT/gYEa7N703sZyreJ1NfQfNXb4P0rY
15xR05eVcJ7TPdDq30lo+ky5Aj2DaqHLIIBX2xv01qgDbPq6RCfhElsK
-----END PRIVATE KEY-----
"""
CERTIFICATE = Path(__file__).parents[1] / "e2e/localhost.pem"


def ipv6_loopback() -> list[str]:
    """``::1``, where this machine has it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as tried:
        tried.bind(("::1", 0))
        return ["::1"]
    return []


IPV6_LOOPBACK = ipv6_loopback()


def app_with(access: Access) -> FastAPI:
    return create_app(replace(server_state(FakeEngine(), adapter("poet")), access=access))


def app_for(*origins: str) -> FastAPI:
    return app_with(Access(origins=frozenset(origins)))


def preflight(app: FastAPI, origin: str, headers: str = "content-type", **more: str) -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": headers}
    return ask(app, "OPTIONS", CHAT, headers={**asked, **more})


def test_a_preflight_of_an_allowed_page_may_have_any_header_of_an_sdk() -> None:
    headers = "authorization,content-type,x-stainless-arch,x-stainless-anything-new,anthropic-version"
    answer = preflight(app_for(PAGE), PAGE, headers)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-headers"] == headers
    assert {"POST", "GET", "DELETE"} <= set(answer.headers["access-control-allow-methods"].split(", "))
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]


def test_a_preflight_from_a_public_page_may_reach_this_machine() -> None:
    answer = preflight(app_for(PAGE), PAGE, **{"access-control-request-private-network": "true"})
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("origins", [(), ("https://other.example.com",)])
@pytest.mark.parametrize("origin", [PAGE, "http://app.example.com", f"{PAGE}:8443", "null", f"{PAGE}.evil.example"])
def test_no_other_page_gets_a_header(origins: tuple[str, ...], origin: str) -> None:
    app = app_for(*origins)
    for answer in (preflight(app, origin), ask(app, "POST", CHAT, json=ONE, headers={"origin": origin})):
        assert [name for name in answer.headers if name.startswith("access-control-")] == []
    assert preflight(app, origin).status_code != 204


def test_answers_and_errors_of_every_layer_can_be_read_by_the_page() -> None:
    access = Access(origins=frozenset({PAGE}), hosts=frozenset({"test"}))
    app = app_with(access)
    from_page = {"origin": PAGE}
    large = {**from_page, "content-length": str(MAX_BODY_BYTES + 1)}
    answers = [
        (200, ask(app, "POST", CHAT, json={**ONE, "model": "poet"}, headers=from_page)),
        (404, ask(app, "POST", CHAT, json={**ONE, "model": "nobody"}, headers=from_page)),
        (413, ask(app, "POST", CHAT, content=b"{}", headers=large)),
        (403, ask(app, "POST", "/v1/load_lora_adapter", json={}, headers=from_page)),
        (403, ask(app, "GET", "/v1/models", headers={**from_page, "host": "evil.example"})),
    ]
    for status, answer in answers:
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]
    assert "x-quickchange-adapter" in answers[0][1].headers["access-control-expose-headers"]


def test_any_origin_is_written_as_such() -> None:
    answer = ask(app_for("*"), "GET", "/v1/models", headers={"origin": PAGE})
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "host",
    [
        "localhost/v1/models?",
        "localhost/",
        "localhost?x",
        "localhost#x",
        "user@localhost",
        "localhost:80:80",
        "localhost:port",
        "local host",
        "[::1",
        "",
        "\u00e9",
        "x" * 300,
    ],
)
def test_a_malformed_host_is_refused_under_any_configuration(host: str) -> None:
    assert host_name(host) is None
    for hosts in (None, frozenset({"localhost"})):
        answer = ask(app_with(Access(hosts=hosts)), "GET", "/v1/models", headers=[(b"host", host.encode())])
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:1", "[::1]:8000", "box.lan"])
def test_the_names_of_a_local_server_are_answered(host: str) -> None:
    hosts = allowed_hosts(["box.lan"], "127.0.0.1", on_loopback=True)
    assert ask(app_with(Access(hosts=hosts)), "GET", "/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.2"])
def test_a_name_that_was_made_to_mean_this_machine_is_refused_but_for_probes(host: str) -> None:
    app = app_with(Access(hosts=allowed_hosts([], "127.0.0.1", on_loopback=True)))
    answer = ask(app, "GET", "/v1/models", headers={"host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    assert "evil" not in answer.text
    assert ask(app, "GET", "/health", headers={"host": host}).status_code == 200


def test_elsewhere_than_on_loopback_names_are_checked_where_they_are_configured() -> None:
    assert allowed_hosts([], "10.0.0.1", on_loopback=False) is None
    names = allowed_hosts(["API.example.com"], "fe80::1", on_loopback=False)
    assert names == frozenset({"localhost", "127.0.0.1", "[::1]", "[fe80::1]", "api.example.com"})


def test_localhost_is_both_families_on_one_port() -> None:
    with bound_sockets("localhost", 0) as sockets:
        assert [each.getsockname()[0] for each in sockets] == ["127.0.0.1", *IPV6_LOOPBACK]
        assert len({each.getsockname()[1] for each in sockets}) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", *IPV6_LOOPBACK])
def test_loopback_needs_no_key(host: str) -> None:
    with bound_sockets(host, 0) as sockets:
        access = build_access(Settings(host=host), sockets)
    assert (access.on_loopback, access.keys.is_open) == (True, True)
    assert access.hosts is not None and {"localhost", "127.0.0.1", "[::1]"} <= access.hosts


@pytest.mark.parametrize("host", ["0.0.0.0", *(["::"] if IPV6_LOOPBACK else [])])
def test_other_addresses_need_a_key_or_the_word_for_none(host: str) -> None:
    with bound_sockets(host, 0) as sockets:
        for open_settings in (Settings(host=host), Settings(host=host, admin_key="an-admin-key-of-some-length")):
            with pytest.raises(SettingsError, match=r"QUICKCHANGE_API_KEY.*--api-keys.*--allow-unauthenticated"):
                build_access(open_settings, sockets)
        assert build_access(Settings(host=host, allow_unauthenticated=True), sockets).keys.is_open
        access = build_access(Settings(host=host, api_key="a-key-of-some-length"), sockets)
    assert (access.on_loopback, access.hosts) == (False, None)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("https://App.Example.com", "https://app.example.com"),
        ("https://app.example.com:443", "https://app.example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
    ],
)
def test_an_origin_is_what_a_browser_sends(written: str, expected: str) -> None:
    assert build_access(Settings(allow_origin=(written,)), ()).origins == {expected}


@pytest.mark.parametrize(
    "origin", ["app.example.com", "https://app.example.com/", "https://*.example.com", "null", "*x"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(SettingsError, match=r"--allow-origin .* is no origin: write SCHEME://HOST"):
        build_access(Settings(allow_origin=(origin,)), ())


def test_every_web_page_needs_a_key_or_the_word_for_none() -> None:
    with pytest.raises(SettingsError, match=r"every web page that you visit"):
        build_access(Settings(allow_origin=("*",)), ())
    for settings in (
        Settings(allow_origin=("*",), api_key="a-key-of-some-length"),
        Settings(allow_origin=("*",), allow_unauthenticated=True),
    ):
        assert build_access(settings, ()).origins == {"*"}


@pytest.mark.parametrize("name", ["http://x", "x:8000", "x/y", "*.example.com"])
def test_what_is_no_host_name_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=r"--allowed-host .* is no host name"):
        build_access(Settings(allowed_host=(name,)), ())


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    check_certificate(Settings(ssl_certfile=CERTIFICATE))
    check_certificate(Settings(ssl_certfile=CERTIFICATE, ssl_keyfile=CERTIFICATE))
    text = CERTIFICATE.read_text()
    (tmp_path / "other.pem").write_text(OTHER_KEY)
    (tmp_path / "certificate.pem").write_text(text.partition("-----BEGIN PRIVATE")[0])
    for certificate, key, reason in (
        (None, CERTIFICATE, "needs --ssl-certfile"),
        (tmp_path / "missing.pem", None, "No such file"),
        (tmp_path / "certificate.pem", None, "a certificate and its private key in PEM are needed"),
        (Path(__file__), None, "a certificate and its private key in PEM are needed"),
        (CERTIFICATE, tmp_path / "other.pem", "the key is not that of the certificate"),
    ):
        with pytest.raises(SettingsError, match=reason):
            check_certificate(Settings(ssl_certfile=certificate, ssl_keyfile=key))
