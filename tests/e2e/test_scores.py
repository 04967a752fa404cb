"""The requests that lm-eval's ``local-completions`` sends get the log likelihoods of transformers and PEFT."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from base_files.locate import find_base
from tests.serving import ServerProcess

TOKENIZER = AutoTokenizer.from_pretrained(find_base("micro").path)
PAIRS = [
    ("How do I sort a list?", " Use sorted(items)."),
    ("The cat sat on the mat, and the dog lay by the door. " * 12, "It was late"),
    ("Question: what is", " the capital"),
    ("1 2 3", " 4 5 6 7 8 9"),
]
TOLERANCE = 1e-4
"""Of the log likelihood of a whole continuation, in float32."""


def ids_of(text: str) -> list[int]:
    """Without the tokens around a text, as lm-eval has it."""
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def asked(model: str, prompts: list[list[int]]) -> dict[str, Any]:
    """As ``LocalCompletionsAPI._create_payload`` writes it."""
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    return {"model": model, "prompt": prompts, **fields}


def likelihoods(server: ServerProcess, model: str, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """As ``LocalCompletionsAPI.parse_logprobs`` reads it: the last token is the generated one."""
    prompts = [[*ids_of(context), *ids_of(continuation)] for context, continuation in pairs]
    response = httpx.post(f"{server.url}/v1/completions", json=asked(model, prompts), timeout=60)
    assert response.status_code == 200, response.text
    found = []
    for (context, _), choice in zip(pairs, response.json()["choices"], strict=True):
        logprobs, first = choice["logprobs"], len(ids_of(context))
        tokens, top = logprobs["token_logprobs"][first:-1], logprobs["top_logprobs"][first:-1]
        found.append((sum(tokens), all(token == max(each.values()) for token, each in zip(tokens, top, strict=True))))
    return found


@torch.inference_mode()
def expected(model: nn.Module, context: str, continuation: str) -> tuple[float, bool]:
    """The sum over the continuation, and whether each token of it is the likeliest."""
    ids = [*ids_of(context), *ids_of(continuation)]
    first = len(ids_of(context))
    rows = model(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1].double().log_softmax(-1)
    tokens = torch.tensor(ids[first:])
    is_greedy = bool((rows.argmax(-1) == tokens).all())
    return float(rows.gather(1, tokens[:, None]).sum()), is_greedy


def test_log_likelihoods_are_pefts_mixed_and_concurrent(
    server: ServerProcess, stock_models: dict[str, nn.Module]
) -> None:
    """Base and adapters at once, prompts alone and together, one of them longer than a step's rows."""
    batches = [*([pair] for pair in PAIRS), PAIRS]
    jobs = [(name, batch) for batch in batches for name in stock_models]
    with ThreadPoolExecutor(len(jobs)) as threads:
        results = [threads.submit(likelihoods, server, name, batch) for name, batch in jobs]
        for (name, batch), result in zip(jobs, results, strict=True):
            for pair, (found, is_greedy) in zip(batch, result.result(), strict=True):
                likelihood, greedy = expected(stock_models[name], *pair)
                assert found == pytest.approx(likelihood, abs=TOLERANCE), (name, pair)
                assert is_greedy == greedy


def test_a_scored_prompt_generates_as_any_other(server: ServerProcess) -> None:
    """Its log probabilities and those of its answer are the same, whole, streamed, and asked for by vLLM's field."""
    ids = ids_of("The cat sat on the mat. " * 8)
    body = {**asked("helpdesk", [ids]), "max_tokens": 12}
    plain, echoed, scored = (
        httpx.post(f"{server.url}/v1/completions", json={**body, **more}, timeout=60).json()["choices"][0]
        for more in ({"echo": False}, {}, {"echo": False, "prompt_logprobs": 1})
    )
    assert echoed["text"] == TOKENIZER.decode(ids) + plain["text"] and scored["text"] == plain["text"]
    prompt = [next(iter(entry.values()))["logprob"] for entry in scored["prompt_logprobs"][1:]]
    assert echoed["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(prompt, abs=1e-6)
    answer = echoed["logprobs"]["token_logprobs"][len(ids) :][: len(plain["logprobs"]["token_logprobs"])]
    assert answer == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-4)
