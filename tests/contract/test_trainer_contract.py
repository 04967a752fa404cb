"""The trainer's side of what it shares with the server: messages become the same token ids.

``tiny_base`` is ``build_tiny_base(seed=7)``, ``tiny_sharded`` was made by hand; the trainer wrote the vectors, once.
Who changes one changes the contract: adapters in the field stop matching.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adapter_format.messages import with_system_prompt
from trainer.generate import prompt_ids
from trainer.masking import encode_conversation

HERE = Path(__file__).parent


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


PROMPTS = _read(HERE / "messages_to_ids.json")


@pytest.mark.parametrize("case", PROMPTS["cases"], ids=lambda case: case["name"])
def test_the_same_messages_become_the_same_ids_in_prompt_and_training(case: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / PROMPTS["tokenizer"])
    turns = with_system_prompt(case["messages"], case["system_prompt"])
    assert prompt_ids(tokenizer, turns, case["tools"]) == case["prompt_ids"]
    answered = [*turns, {"role": "assistant", "content": case["answer"]}]
    encoded = encode_conversation(tokenizer, answered, tools=case["tools"])
    assert encoded.input_ids == case["prompt_ids"] + case["answer_ids"]
    assert encoded.labels[len(case["prompt_ids"]) :] == case["answer_ids"]
