"""A server with API keys and HTTPS: what raw requests get past its door, what its log tells, what SIGHUP changes."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from server.api.auth.keys import digest_of
from tests.serving import ROOT, ServerProcess, running_server

CERTIFICATE = Path(__file__).with_name("localhost.pem")
HELPDESK, METRICS, ADMIN, NEW = (f"canary-{name}-key-0123456789abcdef" for name in ("shop", "metrics", "admin", "new"))
WRONG = "canary-wrong-key-0123456789abcdef"
PAGE = "https://app.example.com"
ALIASES = 'support = "helpdesk"\nother = "json"\ncanary = {helpdesk = 0.5, json = 0.5}\n'


def entry(label: str, key: str, *lines: str) -> str:
    return "\n".join([f"[{label}]", f'sha256 = "{digest_of(key).hex()}"', *lines, ""])


ENTRIES = "\n".join(
    [
        entry("shop", HELPDESK, 'adapters = ["helpdesk"]'),
        entry("prometheus", METRICS, 'scopes = ["metrics"]'),
        entry("operator", ADMIN, 'scopes = ["admin"]'),
    ]
)


@dataclass(frozen=True)
class Protected:
    """The server, its key file and its adapter folder."""

    server: ServerProcess
    keys: Path
    adapters: Path

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.server.url, headers=headers, verify=trusting(), timeout=30)

    def raw(self, request: bytes, *, host: str = "127.0.0.1") -> bytes:
        """What the server sends until it closes the connection, or until a second passes without a byte."""
        received = b""
        plain = socket.create_connection((host, self.port), timeout=5)
        with trusting().wrap_socket(plain, server_hostname="localhost") as tls:
            tls.settimeout(1.0)
            with contextlib.suppress(OSError):  # the server may refuse a request before its end
                tls.sendall(request)
                while data := tls.recv(65536):
                    received += data
        return received


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=CERTIFICATE)


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    root = tmp_path_factory.mktemp("protected")
    keys, adapters = root / "keys.toml", root / "adapters"
    keys.write_text(ENTRIES)
    keys.chmod(0o600)
    for name in ("helpdesk", "json"):
        shutil.copytree(ROOT / "adapters" / name, adapters / name)
    (adapters / "aliases.toml").write_text(ALIASES)
    flags = ["--host", "localhost", "--api-keys", str(keys), "--adapters-dir", str(adapters), "--no-demo-adapters"]
    flags += ["--ssl-certfile", str(CERTIFICATE), "--allow-origin", PAGE, "--scan-interval", "0.2"]
    with running_server(*flags) as server:
        yield Protected(server, keys, adapters)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def closing(*lines: str) -> bytes:
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    "lines",
    [
        ("GET /v1/models HTTP/1.1", "Host: localhost"),
        ("HEAD /v1/models HTTP/1.1", "Host: localhost"),
        ("OPTIONS /v1/models HTTP/1.1", "Host: localhost"),
        ("OPTIONS * HTTP/1.1", "Host: localhost"),
        ("OPTIONS /v1/models HTTP/1.1", "Host: localhost", "Access-Control-Request-Method: GET"),
        ("OPTIONS /v1/models HTTP/1.1", "Host: localhost", "Origin: https://x.y", "Access-Control-Request-Method: GET"),
        ("GET //v1/models HTTP/1.1", "Host: localhost"),
        ("GET /v1/models/ HTTP/1.1", "Host: localhost"),
        ("GET //health HTTP/1.1", "Host: localhost"),
        ("GET /health/../v1/models HTTP/1.1", "Host: localhost"),
        ("GET /health/%2e%2e/v1/models HTTP/1.1", "Host: localhost"),
        ("GET /%2e%2e/v1/models HTTP/1.1", "Host: localhost"),
        ("GET /v1/models;/health HTTP/1.1", "Host: localhost"),
        ("GET /v1/models%3f/health HTTP/1.1", "Host: localhost"),
        ("GET /v1/models%00/health HTTP/1.1", "Host: localhost"),
        ("GET /v1/models?/health HTTP/1.1", "Host: localhost"),
        ("GET /METRICS HTTP/1.1", "Host: localhost"),
        ("GET /%6detrics HTTP/1.1", "Host: localhost"),
        ("GET http://localhost/v1/models HTTP/1.1", "Host: localhost"),
        ("GET http://localhost/health HTTP/1.1", "Host: localhost"),
        ("POST /health HTTP/1.1", "Host: localhost", "Content-Length: 0"),
        ("GET /v1/models HTTP/1.1", "Host: localhost", "X-Original-URL: /health", "X-Forwarded-Prefix: /health"),
        ("GET /v1/models HTTP/1.1", "Host: localhost", "Authorization:"),
        ("GET /v1/models HTTP/1.1", "Host: localhost", f"Authorization: {HELPDESK}"),
        ("GET /v1/models HTTP/1.1", "Host: localhost", f"Authorization: Basic {HELPDESK}"),
        ("GET /v1/models HTTP/1.1", "Host: localhost", *(f"Authorization: Bearer {key}" for key in (WRONG, HELPDESK))),
        ("GET /v1/models HTTP/1.1", "Host: localhost", *[f"Authorization: Bearer {HELPDESK}"] * 2),
        ("GET /v1/models HTTP/1.1", "Host: localhost", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    ],
)
def test_no_spelling_of_a_request_gets_past_without_a_key(protected: Protected, lines: tuple[str, ...]) -> None:
    answer = protected.raw(closing(*lines))
    assert status_of(answer) in (400, 401), answer
    assert b"helpdesk" not in answer and b"micro" not in answer


def test_a_key_counts_for_its_own_request_only(protected: Protected) -> None:
    """Of requests on one connection, sent at once."""
    right = "\r\n".join(["GET /v1/models HTTP/1.1", "Host: localhost", f"Authorization: Bearer {HELPDESK}", "", ""])
    answer = protected.raw(right.encode() + closing("GET /v1/models HTTP/1.1", "Host: localhost"))
    first, _, second = answer.partition(b"HTTP/1.1 401")
    assert status_of(first) == 200 and b"helpdesk" in first
    assert b"invalid_api_key" in second and b"helpdesk" not in second


@pytest.mark.parametrize("host", ["localhost/v1/models?", "evil.example", "localhost@evil.example", "localhost:x"])
def test_no_host_header_gets_past(protected: Protected, host: str) -> None:
    """A server that rebuilt its URL from the Host header took /health for the path (CVE-2026-48746)."""
    for path in ("/v1/models", "/health/../v1/models"):
        assert status_of(protected.raw(closing(f"GET {path} HTTP/1.1", f"Host: {host}"))) == 403
    twice = protected.raw(closing("GET /v1/models HTTP/1.1", "Host: localhost", "Host: localhost"))
    assert status_of(twice) == 400


def test_headers_that_are_too_large_are_refused(protected: Protected) -> None:
    long = protected.raw(closing("GET /health HTTP/1.1", "Host: localhost", f"X-Long: {'x' * 1_000_000}"))
    assert long == b"" or status_of(long) in (400, 431)
    with protected.client(HELPDESK) as client:
        assert client.get("/health", headers={"x-long": "x" * 30_000}).status_code == 200


def test_an_offer_to_upgrade_to_http_2_does_not_lose_the_body(protected: Protected) -> None:
    body = json.dumps({"model": "helpdesk", "prompt": "hello", "max_tokens": 1})
    head = closing(
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {HELPDESK}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    ).replace(b"Connection: close", b"Connection: Upgrade, HTTP2-Settings, close")
    answer = protected.raw(head + body.encode())
    assert status_of(answer) == 200, answer
    assert b'"text_completion"' in answer


def test_localhost_answers_on_both_families(protected: Protected) -> None:
    answer = closing("GET /health HTTP/1.1", "Host: localhost")
    hosts = [line.split("//")[1].rpartition(":")[0].strip("[]") for line in served_on(protected.server)]
    assert hosts[0] == "127.0.0.1"
    assert [status_of(protected.raw(answer, host=host)) for host in hosts] == [200] * len(hosts)


def served_on(server: ServerProcess) -> list[str]:
    line = next(line for line in server.log if "serving on" in line)
    return [word for word in line.split() if word.startswith("https://")]


def test_a_key_has_its_adapters_and_no_others(protected: Protected) -> None:
    with protected.client(HELPDESK) as client, protected.client(ADMIN) as admin:
        listed = {model["id"] for model in client.get("/v1/models").json()["data"]}
        digest = admin.get("/v1/models/json").json()["digest"]
        hidden = ["json", f"json@{digest}", "json:0.5", "helpdesk+json", "other", "canary", "JSON", "micro:json"]
        assert listed == {"micro", "helpdesk", "support"}
        for model in ("helpdesk", "support", "micro"):
            body = {"model": model, "prompt": "x", "max_tokens": 1}
            assert client.post("/v1/completions", json=body).status_code == 200
        for model in hidden:
            asked = client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1, "user": "a"})
            unknown = client.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
            assert (asked.status_code, asked.json()["error"]["code"]) == (404, "model_not_found"), model
            assert unknown.status_code == 404
            not_told = {"json", "other", "canary"} - set(re.split("[@:+]", model))
            assert [name for name in not_told if f"`{name}`" in asked.text + unknown.text] == []
            assert client.get(f"/v1/models/{model}").status_code == 404
        assert {"json", "other", "canary"} <= {model["id"] for model in admin.get("/v1/models").json()["data"]}


def test_openais_client_sends_the_key(protected: Protected) -> None:
    url = protected.server.url
    with openai.OpenAI(base_url=f"{url}/v1", api_key=HELPDESK, http_client=openai_transport()) as client:
        assert "helpdesk" in [model.id for model in client.models.list()]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=WRONG, max_retries=0, http_client=openai_transport()) as wrong:
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.models.list()
        assert caught.value.code == "invalid_api_key" and WRONG not in str(caught.value)


def openai_transport() -> openai.DefaultHttpxClient:
    return openai.DefaultHttpxClient(verify=trusting())


def test_the_chat_command_sends_the_key_over_https(protected: Protected) -> None:
    command = [sys.executable, "-m", "server", "chat", "--url", protected.server.url, "--adapter", "helpdesk", "Hello?"]
    environment = {"PYTHONPATH": str(ROOT), "SSL_CERT_FILE": str(CERTIFICATE), "HOME": "/nonexistent"}

    def chat(*flags: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *flags], env=environment | more, capture_output=True, text=True, timeout=60)

    for right in (chat(QUICKCHANGE_API_KEY=HELPDESK), chat("--api-key", HELPDESK)):
        assert (right.returncode, right.stderr) == (0, "")
        assert right.stdout.strip()
    wrong = chat()
    assert wrong.returncode == 1 and "API key is missing or wrong" in wrong.stderr


def test_pages_of_an_allowed_origin_get_answers_and_refusals(protected: Protected) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with protected.client(None) as client:
        assert client.options("/v1/chat/completions", headers=asked).status_code == 204
        refused = client.get("/v1/models", headers={"origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def test_sighup_reads_keys_and_aliases_again_and_keeps_the_old_ones_if_the_file_is_broken(
    protected: Protected,
) -> None:
    server, errors = protected.server, len(errors_in(protected.server.log))

    def status(key: str) -> int:
        with protected.client(key) as client:
            return client.get("/v1/models").status_code

    def reload(keys: str) -> None:
        already = len(server.log)
        protected.keys.write_text(keys)
        server.process.send_signal(signal.SIGHUP)
        server.until("it is logged", lambda: any("key" in line for line in server.log[already:]))

    assert (status(HELPDESK), status(NEW)) == (200, 401)
    reload(ENTRIES + entry("new", NEW) + '[broken]\nsha256 = "x"\n')
    assert (status(HELPDESK), status(NEW)) == (200, 401)
    found = errors_in(server.log)[errors:]
    assert len(found) == 1 and "'broken' needs 'sha256'" in found[0]
    reload(ENTRIES + entry("new", NEW))
    assert (status(HELPDESK), status(NEW)) == (200, 200)
    reload(ENTRIES)
    assert (status(HELPDESK), status(NEW)) == (200, 401)


def errors_in(log: list[str]) -> list[str]:
    return [line for line in log if " ERROR " in line]


def test_no_key_is_in_a_log_line_a_metric_or_an_error(protected: Protected) -> None:
    """After all tests of this module: of right keys and wrong ones, in every header and place that may carry one."""
    texts = []
    for key in (HELPDESK, METRICS, WRONG):
        with protected.client(key) as client:
            for path in ("/v1/models", "/metrics", f"/v1/models/{key}", f"/{key}", "/v1/load_lora_adapter"):
                answer = client.get(path, headers={"x-api-key": key, "x-request-id": f"{key}!"})
                texts.append(str(answer.headers) + answer.text.replace(f"/{key}", ""))
            body = {"model": "helpdesk", "prompt": "x", "max_tokens": 1, "temperature": key}
            answer = client.post("/v1/completions", json=body)
            texts.append(str(answer.headers) + answer.text)
    with protected.client(METRICS) as client:
        metrics = client.get("/metrics").text
    assert 'quickchange_key_requests_total{key="shop"}' in metrics
    assert 'quickchange_key_tokens_total{key="shop",kind="completion"}' in metrics
    assert any("adapter=helpdesk@" in line and "key=shop" in line for line in protected.server.log)
    leaked = [text for text in (*texts, metrics, *protected.server.log) if "canary-" in text]
    assert [text for text in leaked if "model_not_found" not in text] == []
