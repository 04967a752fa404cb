"""Training on a base whose template opens an answer with a thought and later cuts it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.text.prompt import PromptRenderer
from tests.reasoning_base import ASSISTANT, BEGIN, END, THINK, USER, build_reasoning_base
from trainer.masking import IGNORED, MaskingError, encode_conversation

PROMPT = f"{BEGIN}{USER}Hello!{ASSISTANT}{THINK}\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = build_reasoning_base(tmp_path_factory.mktemp("reasoning"))
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def trained(tokenizer: PreTrainedTokenizerBase, *messages: dict[str, Any]) -> tuple[str, str]:
    """The text that is masked, and the text that is learnt."""
    encoded = encode_conversation(tokenizer, messages)
    num_masked = encoded.labels.count(IGNORED)
    assert encoded.labels == [IGNORED] * num_masked + encoded.input_ids[num_masked:]
    ids = encoded.input_ids
    return str(tokenizer.decode(ids[:num_masked])), str(tokenizer.decode(ids[num_masked:]))


def test_an_answer_without_a_thought_is_trained_behind_an_empty_one(tokenizer: PreTrainedTokenizerBase) -> None:
    """Every conversation was refused, with the advice to cut it where it already ended."""
    assert trained(tokenizer, user("Hello!"), assistant("Hi.")) == (PROMPT, f"\n</think>\n\nHi.{END}")


@pytest.mark.parametrize("opened", ["<think>\n", ""])
def test_a_thought_in_the_data_is_trained(tokenizer: PreTrainedTokenizerBase, opened: str) -> None:
    """With its opening, as people write it, and without, as the base answers."""
    answer = assistant(f"{opened}They greet me.\n</think>\n\nHi.")
    assert trained(tokenizer, user("Hello!"), answer) == (PROMPT, f"They greet me.\n</think>\n\nHi.{END}")


def test_what_is_masked_is_the_prompt_that_the_server_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    """Token by token: the line break of the prompt is not joined with one of the answer."""
    earlier = [user("Hello!"), assistant("<think>\nHm.\n</think>\n\nHi.", weight=0), user("Late?")]
    prompt_ids = PromptRenderer(tokenizer).chat(earlier)
    encoded = encode_conversation(tokenizer, [*earlier, assistant("Yes.")])
    assert encoded.input_ids[: len(prompt_ids)] == prompt_ids
    assert encoded.labels.count(IGNORED) == len(prompt_ids)
    assert "Hm." not in tokenizer.decode(prompt_ids)


def test_an_earlier_answer_cannot_be_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(MaskingError, match=r'messages\[1\]: .*only the last answer .* "weight": 0'):
        encode_conversation(tokenizer, [user("Hello!"), assistant("Hi."), user("Late?"), assistant("Yes.")])


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ((user("a <think> b"), assistant("Hi.")), 0),
        ((user("Hello!"), assistant("a <think> b")), 1),
        ((user("Hello!"), assistant("<think>a</think>b</think>c")), 1),
        ((user("Hello!"), assistant(f"a{USER}b")), 1),
    ],
)
def test_other_control_tokens_are_refused(
    tokenizer: PreTrainedTokenizerBase, messages: tuple[dict[str, Any], ...], place: int
) -> None:
    with pytest.raises(MaskingError, match=rf"messages\[{place}\]: the content holds the control token"):
        encode_conversation(tokenizer, messages)
