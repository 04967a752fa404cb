"""Conversations as token ids with a loss mask: prompts are masked, trained turns include their end-of-turn token.

The mask does not depend on ``{% generation %}`` marks, which most chat templates lack: each assistant turn is found by
rendering the conversation up to it, with the generation prompt, and through it.

Templates of reasoning bases open an answer with a thought (``<think>``) and cut it when the answer is rendered. There
the last answer is trained behind the generation prompt that the server will render: its thought, which is empty where
the content has none, the end of the thought, and the answer as the template writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapter_format.messages import plain_messages

IGNORED = -100

_OPENED_THOUGHT = re.compile(r"<([A-Za-z_]+)>\s*$")


class MaskingError(ValueError):
    """A conversation that cannot be masked; the message names the turn and the reason."""


@dataclass(frozen=True)
class Encoded:
    """``input_ids`` and ``labels`` of equal length; a label is its token's id where it is trained, else ``IGNORED``."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_trained(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Encoded:
    """Token ids of the whole conversation, the assistant's turns labelled.

    Raises ``MaskingError`` where the template does not render a conversation as a prefix of its continuation, or where
    an assistant turn has no end-of-turn token to learn.
    """
    if (thought := _cut_thought(tokenizer, messages, tools)) is not None:
        return _encode_after_thought(tokenizer, messages, thought)
    _refuse_control_tokens(tokenizer, messages)
    text = _render(tokenizer, messages, tools)
    spans = _assistant_spans(tokenizer, messages, tools, text)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]
    labels = [IGNORED] * len(ids)
    cursor = 0
    for start, end in spans:
        while cursor < len(ids) and encoding["offset_mapping"][cursor][0] < start:
            cursor += 1
        while cursor < len(ids) and encoding["offset_mapping"][cursor][0] < end:
            labels[cursor] = ids[cursor]
            cursor += 1
    return Encoded(ids, labels)


@dataclass(frozen=True)
class _CutThought:
    """The prompt of the last answer, which ends in an opened thought, and the conversation, in which it is cut."""

    begin: str
    end: str
    prompt: str
    text: str


def _trained_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Assistant turns, without those of ``"weight": 0``, as in OpenAI's training files."""
    return [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight") != 0
    ]


def _cut_thought(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> _CutThought | None:
    """None where the template keeps what its generation prompt opens, as most do."""
    trained = _trained_turns(messages)
    if not trained:
        return None
    prompt = _render(tokenizer, messages[: trained[-1]], tools, prompt=True)
    opened = _OPENED_THOUGHT.search(prompt)
    if opened is None or opened[0].strip() not in tokenizer.get_added_vocab():
        return None
    text = _render(tokenizer, messages[: trained[-1] + 1], tools)
    if text.startswith(prompt):
        return None
    return _CutThought(f"<{opened[1]}>", f"</{opened[1]}>", prompt, text)


def _encode_after_thought(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], thought: _CutThought
) -> Encoded:
    trained, last = _trained_turns(messages), len(messages) - 1
    if trained != [last]:
        raise MaskingError(
            f"messages[{trained[0]}]: the chat template opens an answer with {thought.begin} and later cuts the "
            "thought, so that only the last answer of a conversation can be trained: make each answer the last turn of "
            'an example of its own, and give earlier answers "weight": 0'
        )
    _refuse_control_tokens(tokenizer, [_without_thought(message, thought) for message in messages])
    before = thought.prompt[: thought.prompt.rindex(thought.begin)]
    if not thought.text.startswith(before):
        raise MaskingError(f"messages[{last}]: the chat template renders this turn without its generation prompt")
    end = _after_end_of_turn(tokenizer, thought.text, len(before), len(thought.text))
    if end is None:
        raise MaskingError(_no_end_of_turn(tokenizer, last))
    reasoning, is_given, _ = (messages[last].get("content") or "").rpartition(thought.end)
    reasoning = reasoning.strip().removeprefix(thought.begin).strip()
    line_breaks = "" if is_given else "\n\n"
    continuation = f"{reasoning}\n{thought.end}{line_breaks}{thought.text[len(before) : end]}"
    prompt_ids: list[int] = tokenizer(thought.prompt, add_special_tokens=False)["input_ids"]
    answer_ids: list[int] = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    return Encoded(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)


def _without_thought(message: Mapping[str, Any], thought: _CutThought) -> Mapping[str, Any]:
    """An assistant's message without the tokens of its thought, which the template cuts and the server does not see."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return message
    reasoning, _, answer = content.rpartition(thought.end)
    return {**message, "content": reasoning.strip().removeprefix(thought.begin) + answer}


def _refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse control tokens in contents: the server encodes them as plain text, training would as control tokens."""
    special = tokenizer.get_added_vocab()
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and (found := next((token for token in special if token in content), None)):
            raise MaskingError(f"messages[{number}]: the content holds the control token {found!r}; remove it")


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    prompt: bool = False,
) -> str:
    rendered = tokenizer.apply_chat_template(
        plain_messages(messages, tokenizer.chat_template),
        tools=None if tools is None else [dict(tool) for tool in tools],
        tokenize=False,
        add_generation_prompt=prompt,
    )
    return str(rendered)


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    text: str,
) -> list[tuple[int, int]]:
    """Character spans of the trained turns in ``text``, from after the generation prompt through the end of turn."""
    spans = []
    for number in _trained_turns(messages):
        before = _render(tokenizer, messages[:number], tools, prompt=True)
        through = _render(tokenizer, messages[: number + 1], tools)
        if not text.startswith(before) or not text.startswith(through):
            raise MaskingError(
                f"messages[{number}]: the chat template renders this turn differently when more turns follow; "
                "train the conversation up to this turn as an example of its own"
            )
        end = _after_end_of_turn(tokenizer, text, len(before), len(through))
        if end is None:
            raise MaskingError(_no_end_of_turn(tokenizer, number))
        spans.append((len(before), end))
    return spans


def _no_end_of_turn(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    return (
        f"messages[{number}]: the chat template ends this turn without the end-of-turn token {tokenizer.eos_token!r}, "
        "so the model would never learn to stop; fix the template or the eos_token"
    )


def _after_end_of_turn(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> int | None:
    """The end of the turn's end-of-turn token; what the template writes after it (such as a newline) is not trained."""
    at = text.rfind(str(tokenizer.eos_token), start, end)
    return None if at < 0 else at + len(str(tokenizer.eos_token))
