"""A reasoning base as a folder and as the GGUF that llama.cpp's converter makes of it: the same prompts and answers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.parts.perplexity import Reader
from server.model.loader import load_base
from server.text.prompt import PromptRenderer
from tests.gguf_models import model_arrays, model_metadata, tokenizer_metadata, write_gguf_model
from tests.reasoning_base import CONTEXT, END, END_THINK, build_reasoning_base

CHATS = (
    [{"role": "user", "content": "Hello!"}],
    [
        {"role": "system", "content": "Be brief: 1234"},
        {"role": "user", "content": "Hello <think>!"},
        {"role": "assistant", "content": "<think>\nWho is it?\n</think>\n\nHi, été 東京."},
        {"role": "user", "content": "Is it late?"},
    ],
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, Reader]:
    """Of the folder and of the file."""
    folder = build_reasoning_base(tmp_path_factory.mktemp("reasoning") / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    metadata = model_metadata(model, "qwen2") | tokenizer_metadata(tokenizer, model.vocab_size, "deepseek-r1-qwen")
    metadata["tokenizer.ggml.add_bos_token"] = True
    path = write_gguf_model(folder.parent / "base.gguf", "qwen2", model_arrays(model, "qwen2"), metadata)
    bases = [
        load_base(str(place), name="base", device="cpu", dtype="float32", max_model_len=CONTEXT)
        for place in (folder, path)
    ]
    return Reader(bases[0]), Reader(bases[1])


@pytest.mark.parametrize("chat", CHATS)
def test_a_conversation_has_the_same_ids_and_answer(chat: list[dict[str, str]], readers: tuple[Reader, Reader]) -> None:
    prompts = [PromptRenderer(reader.base.tokenizer).chat(chat) for reader in readers]
    assert prompts[0] == prompts[1]
    answers = [reader.answers(prompts[:1], max_tokens=16) for reader in readers]
    assert answers[0] == answers[1]


def test_a_text_begins_with_the_same_token_and_shows_the_same_ones(readers: tuple[Reader, Reader]) -> None:
    for text in ("The fox isn't late: 1234\n\n", f"well{END_THINK}", ""):
        renderers = [PromptRenderer(reader.base.tokenizer) for reader in readers]
        ids = [renderer.completion(text) for renderer in renderers]
        assert ids[0] == ids[1]
        assert [renderer.decode(ids[0]) for renderer in renderers] == [text, text]


def test_an_answer_ends_at_the_same_token(readers: tuple[Reader, Reader]) -> None:
    for reader in readers:
        assert reader.base.eos_ids == {reader.base.tokenizer.convert_tokens_to_ids(END)}
