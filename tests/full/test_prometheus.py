"""What deploy/ holds for Prometheus, put to the real promtool and to a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.api.auth.keys import digest_of
from tests.serving import ROOT, ServerProcess, running_server

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "quickchange.json"

SCRAPE_KEY, CLIENT_KEY, LIMITED_KEY = (f"{name}-0123456789abcdef" for name in ("scrape", "client", "limited"))
KEYS = (
    ("prometheus", SCRAPE_KEY, 'scopes = ["metrics"]'),
    ("client", CLIENT_KEY, ""),
    ("limited", LIMITED_KEY, "requests_per_minute = 1"),
)

Tool = Callable[[str], str]


@pytest.mark.parametrize(
    "check",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_promtool_accepts_the_configuration_and_the_alerts_pass_their_tests(tool: Tool, check: tuple[str, ...]) -> None:
    done = subprocess.run([tool("promtool"), *check], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    raised = {case["alertname"] for test in tests for case in test["alert_rule_test"] if "exp_alerts" in case}
    assert raised == {rule["alert"] for group in groups for rule in group["rules"]}


def test_promtool_finds_nothing_to_say_about_the_metrics(tool: Tool, server: ServerProcess) -> None:
    use(server)
    exposition = httpx.get(f"{server.url}/metrics").text
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=exposition, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_prometheus_scrapes_a_server_and_every_query_of_the_dashboard_has_an_answer(tool: Tool, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text("".join(f'[{label}]\nsha256 = "{digest_of(key).hex()}"\n{more}\n' for label, key, more in KEYS))
    keys.chmod(0o600)
    flags = "--adapter-memory", "9000000", "--api-keys", str(keys)  # room for two: adapters are loaded meanwhile
    with (
        running_server(*flags) as server,
        running_prometheus(tool("prometheus"), tmp_path, server.url.removeprefix("http://")) as url,
    ):
        server.key = CLIENT_KEY
        hello = {"model": "micro", "prompt": "Hello!", "max_tokens": 2}
        limited = {"authorization": f"Bearer {LIMITED_KEY}"}
        asked = [httpx.post(f"{server.url}/v1/completions", json=hello, headers=limited).status_code for _ in range(2)]
        assert asked == [200, 429]
        wait_for(lambda: values(url, 'up{job="quickchange"}') == ["1"], "up == 1")
        use(server)
        for query in dashboard_queries():
            wait_for(lambda: values(url, query), query)  # noqa: B023  (called before the loop goes on)
        rules = httpx.get(f"{url}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} == {"ok"}
        assert {rule["name"] for rule in rules if rule["state"] == "firing"} == set()


def use(server: ServerProcess) -> None:
    """Requests of each kind, so that each metric has seen something: every model, and one that is not there."""
    for model in [*server.models(), "nobody"]:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=server.headers, timeout=60)
        assert answer.status_code == (404 if model == "nobody" else 200)


def dashboard_queries() -> list[str]:
    """The dashboard's queries with Grafana's variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for query in queries]


@contextmanager
def running_prometheus(program: str, folder: Path, target: str) -> Iterator[str]:
    """Prometheus with deploy/'s configuration, but for the target and the pace."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    config["scrape_configs"][0]["authorization"] = {"credentials_file": "key"}
    (folder / "key").write_text(SCRAPE_KEY)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text())
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [program, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: is_ready(f"http://{address}"), "Prometheus is ready")
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").is_success
    except httpx.ConnectError:
        return False


def values(url: str, query: str) -> list[str]:
    """The values of an instant query, those that are not a number left out."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query})
    assert answer.is_success, answer.text
    return [value for one in answer.json()["data"]["result"] if (value := one["value"][1]) != "NaN"]


def wait_for(true: Callable[[], object], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"after {timeout:.0f} seconds still not: {what}"
        time.sleep(0.3)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
