"""The server's side of what it shares with the trainer: messages become the same token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adapter_format.messages import with_system_prompt
from server.text.prompt import PromptRenderer

HERE = Path(__file__).parent


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


CASES = [case for case in _load(HERE / "messages_to_ids.json")["cases"] if not case["tools"]]
"""Those without tools, which the API refuses."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_same_messages_become_the_same_ids(case: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny_base")
    led = with_system_prompt(case["messages"], case["system_prompt"])
    assert PromptRenderer(tokenizer).chat(led) == case["prompt_ids"]
