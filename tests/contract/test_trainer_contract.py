"""The trainer's side of what it shares with the server: fingerprints, sidecars, token ids.

``tiny_base`` is ``build_tiny_base(seed=7)``, ``tiny_sharded`` was made by hand; the trainer wrote the vectors, once.
Who changes one changes the contract: adapters in the field stop matching.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from trainer.conversations import with_system_prompt
from trainer.generate import prompt_ids
from trainer.masking import encode_conversation
from trainer.sidecar import Sidecar

HERE = Path(__file__).parent
VALID = sorted(HERE.glob("sidecar_valid_*.json"))
INVALID = sorted(HERE.glob("sidecar_invalid_*.json"))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


SCHEMA = _read(HERE / "sidecar.schema.json")
PROMPTS = _read(HERE / "messages_to_ids.json")


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_sidecar_is_accepted_by_schema_and_trainer(path: Path) -> None:
    jsonschema.validate(_read(path), SCHEMA)
    Sidecar.model_validate_json(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_sidecar_is_refused_by_schema_and_trainer(path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_read(path), SCHEMA)
    with pytest.raises(ValidationError):
        Sidecar.model_validate_json(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_sidecar_read_and_written_again_says_the_same(path: Path) -> None:
    sidecar = Sidecar.model_validate_json(path.read_text(encoding="utf-8"))
    assert json.loads(sidecar.to_json()) == _read(path)


@pytest.mark.parametrize("case", PROMPTS["cases"], ids=lambda case: case["name"])
def test_the_same_messages_become_the_same_ids_in_prompt_and_training(case: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / PROMPTS["tokenizer"])
    turns = with_system_prompt(case["messages"], case["system_prompt"])
    assert prompt_ids(tokenizer, turns, case["tools"]) == case["prompt_ids"]
    answered = [*turns, {"role": "assistant", "content": case["answer"]}]
    encoded = encode_conversation(tokenizer, answered, tools=case["tools"])
    assert encoded.input_ids == case["prompt_ids"] + case["answer_ids"]
    assert encoded.labels[len(case["prompt_ids"]) :] == case["answer_ids"]
