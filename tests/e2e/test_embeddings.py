"""Embeddings over HTTP are the mean of transformers' and PEFT's last hidden states, by OpenAI's client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from openai import OpenAI
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer

from base_files.locate import find_base

TOKENIZER = AutoTokenizer.from_pretrained(find_base("micro").path)
TEXTS = ["How do I sort a list?", "The cat sat on the mat. " * 20, "a", "日本"]
TOLERANCE = 1e-5
"""Of a number of a vector of length 1, in float32."""


@torch.inference_mode()
def expected(model: nn.Module, text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean over all tokens, of length 1."""
    decoder: Any = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    hidden = decoder(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]])).last_hidden_state[0]
    mean = hidden.double().mean(0).numpy()
    return np.asarray(mean / np.linalg.norm(mean))


def test_base_and_adapters_embed_as_transformers_and_peft_do_all_at_once(
    client: OpenAI, stock_models: dict[str, nn.Module]
) -> None:
    """The client asks for base64 unless told otherwise; long texts are computed in several chunks."""
    with OpenAI(base_url=client.base_url, api_key="none") as usual, ThreadPoolExecutor() as threads:
        # not the strict client, which takes base64 for a wrong type
        asked = [threads.submit(usual.embeddings.create, model=name, input=TEXTS) for name in stock_models]
        answers = [each.result() for each in asked]
    for (name, model), answer in zip(stock_models.items(), answers, strict=True):
        assert [item.index for item in answer.data] == list(range(len(TEXTS)))
        for text, item in zip(TEXTS, answer.data, strict=True):
            assert np.abs(np.array(item.embedding) - expected(model, text)).max() < TOLERANCE, (name, text)
        assert answer.usage.prompt_tokens == sum(len(TOKENIZER(text)["input_ids"]) for text in TEXTS)
    of_base, of_adapter = (answers[place].data[0].embedding for place in (0, 1))
    assert np.abs(np.array(of_base) - of_adapter).max() > 100 * TOLERANCE
    floats = client.embeddings.create(model="micro", input=TEXTS[0], encoding_format="float", dimensions=16)
    shorter = expected(stock_models["micro"], TEXTS[0])[:16]
    assert np.abs(np.array(floats.data[0].embedding) - shorter / np.linalg.norm(shorter)).max() < TOLERANCE
