"""schemathesis sends what ``/openapi.json`` allows and what it does not: no 5xx, no answer that is not described."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import ROOT, running_server

SCHEMATHESIS = "schemathesis==4.32.5"
KEY = "a-key-of-the-test-of-schemas"
MODELS = ["micro", "helpdesk"]
MAX_MODEL_LEN = "48"
"""Short, so that no answer takes long."""


@pytest.fixture(scope="module")
def schemathesis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, in an environment of its own, because it needs other versions of shared packages."""
    folder = tmp_path_factory.mktemp("schemathesis")
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "pip"), "install", "--quiet", SCHEMATHESIS],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder / "bin" / "schemathesis"


def with_known_models(document: dict[str, Any]) -> dict[str, Any]:
    """The document with names of models that are there, so that requests come further than to a 404."""
    for name, schema in document["components"]["schemas"].items():
        properties = schema.get("properties", {})
        if name.endswith("Request") and "model" in properties:
            absent = [] if "model" in schema.get("required", ()) else [None]
            properties["model"] = {"enum": [*MODELS, *absent]}
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = {"enum": MODELS if parameter["name"] == "model" else ["swagger-ui.css"]}
    return document


def test_the_server_does_what_its_document_says(schemathesis: Path, tmp_path: Path) -> None:
    """Left out is the check that each described body is accepted: rules between fields are not in a schema."""
    adapters = tmp_path / "adapters"  # a copy, because DELETE is tried as well
    shutil.copytree(ROOT / "adapters", adapters)
    flags = [
        "--adapters-dir",
        str(adapters),
        "--max-model-len",
        MAX_MODEL_LEN,
        "--no-demo-adapters",
        "--admin-key",
        KEY,
    ]
    headers = {"authorization": f"Bearer {KEY}"}
    with running_server(*flags) as server:
        document = httpx.get(f"{server.url}/openapi.json", headers=headers).json()
        path = tmp_path / "openapi.json"
        path.write_text(json.dumps(with_known_models(document)))
        command = [
            str(schemathesis), "run", str(path), "--url", server.url, "--header", f"Authorization: Bearer {KEY}",
            "--exclude-checks", "positive_data_acceptance", "--phases", "coverage,fuzzing", "--max-examples", "15",
            "--generation-deterministic", "--request-timeout", "30", "--workers", "2",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-8000:]
        assert httpx.get(f"{server.url}/health").status_code == 200
