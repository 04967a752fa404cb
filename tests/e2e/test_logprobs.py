"""Log probabilities over HTTP are those of PEFT's forward pass on the same base, adapter and tokens."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from base_files.locate import find_base
from tests.serving import ROOT, ServerProcess

MICRO = find_base("micro").path
TOKENIZER = AutoTokenizer.from_pretrained(MICRO)
QUESTION = [{"role": "user", "content": "How do I sort a list?"}]
PROMPT = TOKENIZER.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
NUM_TOP = 4
TOLERANCE = 1e-3
"""Of a log probability, in float32; measured: 5e-5."""
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.4, "top_p": 0.95, "seed": 3},
    {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 1, "logit_bias": {"300": 2}},
)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """The base and an adapter, by transformers and PEFT."""
    load = AutoModelForCausalLM.from_pretrained
    adapter = PeftModel.from_pretrained(load(MICRO, dtype=torch.float32), str(ROOT / "adapters" / "helpdesk"))
    return {"micro": load(MICRO, dtype=torch.float32).eval(), "helpdesk": adapter.eval()}


def ids_by_bytes() -> dict[bytes, int]:
    """The vocabulary, which is byte-level, by the bytes that its tokens stand for."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    plain = {name: number for name, number in TOKENIZER.get_vocab().items() if set(name) <= byte_of.keys()}
    return {bytes(byte_of[character] for character in name): number for name, number in plain.items()}


def post(server: ServerProcess, path: str, model: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of an answer, or of each chunk of it."""
    asked = {"messages": QUESTION} if path == "chat/completions" else {"prompt": PROMPT}
    body = {"model": model, **asked, "max_tokens": 40, **fields}
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
    if not fields.get("stream"):
        return list(response.json()["choices"])
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


@torch.inference_mode()
def check(content: list[dict[str, Any]], model: nn.Module) -> None:
    """Every token's log probability, and those of the likeliest, are the model's."""
    ids_of = ids_by_bytes()
    ids = [ids_of[bytes(token["bytes"])] for token in content]
    logits = model(input_ids=torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
    for token, token_id, expected in zip(content, ids, logits.double().log_softmax(-1), strict=True):
        assert token["logprob"] == pytest.approx(float(expected[token_id]), abs=TOLERANCE)
        top = [top["logprob"] for top in token["top_logprobs"]]
        assert top == pytest.approx(expected.topk(NUM_TOP).values.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model", ["micro", "helpdesk"])
def test_they_are_pefts_streamed_and_whole_and_where_drafts_were_right(
    server: ServerProcess, models: dict[str, nn.Module], model: str, settings: dict[str, Any]
) -> None:
    """The second time the answer is drafted as it came the first time."""
    asked = {"logprobs": True, "top_logprobs": NUM_TOP, **settings}
    (whole,) = post(server, "chat/completions", model, **asked)
    content = whole["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == whole["message"]["content"]
    check(content, models[model])
    accepted = server.metric("quickchange_accepted_draft_tokens_total")
    chunks = post(server, "chat/completions", model, stream=True, **asked)
    assert server.metric("quickchange_accepted_draft_tokens_total") > accepted
    again = [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["content"]]
    check(again, models[model])
    assert [token["token"] for token in again] == [token["token"] for token in content]
    (text,) = post(server, "completions", model, logprobs=NUM_TOP, **settings)
    assert text["logprobs"]["tokens"] == [token["token"] for token in content]
    expected = [token["logprob"] for token in content]
    assert text["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)
