"""The server's readers meet the same golden vectors as the trainer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from server.adapters.content.sidecar import parse_sidecar
from server.api.chat import led_by
from server.text.prompt import PromptRenderer

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE / "sidecar.schema.json").read_text(encoding="utf-8"))
VALID = sorted(HERE.glob("sidecar_valid_*.json"))
INVALID = sorted(HERE.glob("sidecar_invalid_*.json"))


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_sidecar_is_read(path: Path) -> None:
    jsonschema.validate(_load(path), SCHEMA)
    assert parse_sidecar(_load(path)).schema_version == _load(path)["schema_version"]


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_sidecar_is_refused_with_the_field(path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_load(path), SCHEMA)
    with pytest.raises(ValueError, match=r"quickchange\.json: "):
        parse_sidecar(_load(path))


@pytest.mark.parametrize("case", _load(HERE / "messages_to_ids.json")["cases"], ids=lambda case: case["name"])
def test_the_same_messages_become_the_same_ids(case: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny_base")
    led = led_by(case["system_prompt"], case["messages"])
    assert PromptRenderer(tokenizer).chat(led, tools=case["tools"]) == case["prompt_ids"]
