"""What deploy/ says about the server is true: names of metrics, labels, settings, folders and versions."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from server.metrics import FINISH_REASONS, Metrics
from server.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(
        (DEPLOY / "grafana" / "dashboards" / "quickchange.json").read_text(encoding="utf-8")
    )
    return read


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in alert_rules())
    yield from (target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", []))


def exposed() -> dict[str, set[str]]:
    """Each sample's name and its labels, as ``/metrics`` has them for one adapter and one error."""
    metrics = Metrics()
    metrics.know_adapter("an-adapter")
    metrics.http_errors.labels("503")
    metrics.key_requests.labels("a-key")
    metrics.key_tokens.labels("a-key", "prompt")
    metrics.key_refusals.labels("a-key", "max_concurrent")
    metrics.build_info.info({"version": "0", "torch": "0"})
    metrics.base_model_info.info({"name": "a", "dtype": "b", "quantization": "c"})
    return {sample.name: set(sample.labels) for family in metrics.registry.collect() for sample in family.samples}


def test_every_metric_of_the_dashboard_and_the_alerts_exists() -> None:
    named = {name for query in queries() for name in re.findall(r"\bquickchange_\w+", query)}
    assert named - exposed().keys() == set()


def test_every_label_that_a_query_groups_by_or_selects_exists() -> None:
    known = set().union(*exposed().values()) | {"instance", "job"}
    for query in queries():
        grouped = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")}
        selected = {label for group in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)=", group)}
        assert grouped | selected <= known, query


def test_every_finish_reason_that_an_alert_selects_exists() -> None:
    selected = {reason for query in queries() for reason in re.findall(r'finish_reason="(\w+)"', query)}
    assert selected <= set(FINISH_REASONS)


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    shown = " ".join(queries())
    of_a_build = {"quickchange_build_info"}
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in exposed() if name not in of_a_build}
    assert {name for name in families if name not in shown} == set()


def test_every_alert_has_a_row_that_says_what_to_do() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(Quickchange\w+)`", text, re.MULTILINE) == [rule["alert"] for rule in alert_rules()]


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/compose.yaml", "deploy/quickchange.service"])
def test_every_setting_that_a_deployment_names_exists(file: str) -> None:
    named = set(re.findall(r"QUICKCHANGE_([A-Z_]+)", (ROOT / file).read_text(encoding="utf-8")))
    assert named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_the_servers_port_is_one_number_everywhere() -> None:
    port = str(Settings.model_fields["port"].default)
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert f"EXPOSE {port}\n" in dockerfile
    assert f":{port}/health" in dockerfile
    assert compose["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert scraped[0]["static_configs"] == [{"targets": [f"server:{port}"]}]


def test_a_server_without_keys_is_deployed_on_loopback_only_and_under_names_that_no_page_can_take() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    environment = dockerfile.partition("\nENV ")[2].partition("\nUSER")[0]
    assert "QUICKCHANGE_HOST=0.0.0.0" in environment and "ALLOW_UNAUTHENTICATED" not in environment
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["server"]
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    (target,) = scraped[0]["static_configs"][0]["targets"]
    assert server["environment"]["QUICKCHANGE_ALLOW_UNAUTHENTICATED"] == "true"
    assert server["environment"]["QUICKCHANGE_ALLOWED_HOST"] == target.partition(":")[0]
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])


def test_all_ports_of_the_compose_file_are_on_loopback() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert [port for one in services.values() for port in one["ports"] if not port.startswith("127.0.0.1:")] == []


def test_a_stopping_container_and_service_outlive_the_requests_they_let_finish() -> None:
    grace = Settings.model_fields["shutdown_timeout"].default
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["server"]
    unit = (DEPLOY / "quickchange.service").read_text(encoding="utf-8")
    assert int(compose["stop_grace_period"].removesuffix("s")) > grace
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) > grace


def test_whatever_the_image_copies_is_let_through_and_exists_in_a_checkout() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY (?!--)(.*) \S+$", dockerfile, re.MULTILINE) for name in line.split()}
    let_through = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert copied == set(let_through)
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_tested_versions_are_within_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        assert tested[requirement.name.lower()] in requirement.specifier, line
