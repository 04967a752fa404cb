"""A real base in GGUF that nobody here wrote: our engine against transformers' own model of the same file."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from base_files.locate import find_base
from benchmarks.parts.random_adapters import write_adapters
from tests.full.smollm2 import CHATS, GREEDY_TOKENS, LICENCE, SmolLM2, assistant, difference, generate, stock_ids, user

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest, in float32."""
ADAPTERS = tuple(f"random-{number}" for number in range(8))


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight random ones on every projection."""
    return write_adapters(find_base(str(smollm2)), tmp_path_factory.mktemp("adapters"), ADAPTERS)


@pytest.fixture(scope="module")
def hosted(smollm2: Path, adapters: list[Path]) -> Iterator[SmolLM2]:
    """Our engine on the file, with the adapters."""
    hosted = SmolLM2(smollm2)
    for path in adapters:
        hosted.add(path)
    yield hosted
    hosted.base.close()
    gc.collect()


@pytest.fixture(scope="module")
def prompts(hosted: SmolLM2) -> dict[str, list[int]]:
    return {name: hosted.prompts.chat(messages) for name, messages in CHATS.items()}


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_has_the_ids_of_transformers_tokenizer(
    name: str, prompts: dict[str, list[int]], stock_smollm2_tokenizer: Any
) -> None:
    assert prompts[name] == stock_ids(stock_smollm2_tokenizer, CHATS[name])


def test_spaces_before_a_digit_are_cut_as_the_file_says(hosted: SmolLM2, stock_smollm2_tokenizer: Any) -> None:
    """SmolLM2 cuts text at every digit first (``tokenizer.ggml.pre`` is smollm), so that spaces before one stay whole.

    transformers cuts the text of any GGUF as GPT-2 does, which leaves the last space to the digit.
    """
    text = "a\n   1"
    assert hosted.base.tokenizer.tokenize(text) == ["a", "ĊĠĠĠ", "1"]
    assert stock_smollm2_tokenizer.tokenize(text) == ["a", "ĊĠĠ", "Ġ", "1"]


def test_the_template_writes_a_system_prompt_where_there_is_none(hosted: SmolLM2) -> None:
    """SmolLM2's own, unless the conversation begins with one."""
    absent, present = (
        hosted.base.tokenizer.decode(hosted.prompts.chat(messages))
        for messages in ([user("Hi")], [{"role": "system", "content": "Be kind."}, user("Hi")])
    )
    end = "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert absent == f"<|im_start|>system\n{own}{end}"
    assert present == f"<|im_start|>system\nBe kind.{end}"


def test_greedy_answers_are_those_of_transformers(
    hosted: SmolLM2, prompts: dict[str, list[int]], stock_smollm2: Any
) -> None:
    """All chats in one batch, the long one in chunks, against ``generate`` one by one."""
    assert len(prompts["long"]) > 2000
    answers = hosted.engine().answer([*prompts.values()], max_tokens=GREEDY_TOKENS, eos_ids=hosted.base.eos_ids)
    for (name, prompt), answer in zip(prompts.items(), answers, strict=True):
        ids, logits = generate(stock_smollm2, prompt, GREEDY_TOKENS)
        assert answer.ids == ids, name
        assert difference(answer.logits, logits) < TOLERANCE, name


def test_eight_adapters_in_a_batch_answer_as_peft(
    hosted: SmolLM2, adapters: list[Path], prompts: dict[str, list[int]], stock_smollm2: Any
) -> None:
    names = [None, *ADAPTERS]
    asked = [prompts[name] for name in ("fruits", "turns", "Russian", "Python")]
    asked = [asked[number % len(asked)] for number in range(len(names))]
    answers = hosted.engine().answer(asked, max_tokens=8, adapters=names)
    peft = PeftModel.from_pretrained(stock_smollm2, adapters[0], adapter_name=ADAPTERS[0])
    for path in adapters[1:]:
        peft.load_adapter(path, adapter_name=path.name)
    peft.eval()
    try:
        for name, prompt, answer in zip(ADAPTERS, asked[1:], answers[1:], strict=True):
            peft.set_adapter(name)
            assert difference(answer.logits, _logits(peft, prompt, answer.ids)) < TOLERANCE, name
    finally:
        peft.unload()
    assert difference(answers[0].logits, _logits(stock_smollm2, asked[0], answers[0].ids)) < TOLERANCE
    assert len({tuple(answer.ids) for answer in answers[1::4]}) > 1, "the adapters change what is said"


def test_a_reused_prefix_changes_nothing(hosted: SmolLM2, prompts: dict[str, list[int]]) -> None:
    """The next turn of a conversation, and another question behind the same long text."""
    engine = hosted.engine(prefix_caching=True)
    text = LICENCE[:3000]
    about = hosted.prompts.chat([user(f"{text}\nWhat is this text about?")])
    engine.answer([prompts["turns"], about], max_tokens=12)
    follow_ups = [
        hosted.prompts.chat([*CHATS["turns"], assistant("You have two."), user("And what are they called?")]),
        hosted.prompts.chat([user(f"{text}\nWho may use it?")]),
    ]
    again = engine.answer(follow_ups, max_tokens=12)
    fresh = hosted.engine().answer(follow_ups, max_tokens=12)
    least_cached = [len(prompts["turns"]), len(about) - 20]
    for reused, computed, least in zip(again, fresh, least_cached, strict=True):
        assert reused.num_cached >= least
        assert reused.ids == computed.ids
        assert difference(reused.logits, computed.logits) < TOLERANCE


def test_drafts_change_nothing(hosted: SmolLM2) -> None:
    """On text that repeats, so that drafts are right."""
    asked = [
        hosted.prompts.chat([user("Repeat this text three times: The quick brown fox jumps over the lazy dog.")]),
        hosted.prompts.chat([user("Count from 1 to 30.")]),
        hosted.prompts.chat(CHATS["fruits"]),
    ]
    plain = hosted.engine().answer(asked, max_tokens=48)
    engine = hosted.engine(max_draft_tokens=4)
    drafted = engine.answer(asked, max_tokens=48)
    assert engine.num_accepted > 10
    for with_drafts, without in zip(drafted, plain, strict=True):
        assert with_drafts.ids == without.ids
        assert difference(with_drafts.logits, without.logits) < TOLERANCE


@torch.inference_mode()
def _logits(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of the tokens of an answer, float32 [num_tokens, vocab]."""
    logits: torch.Tensor = model(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits
    return logits[0, len(prompt) - 1 :]
