"""Conversations as token ids with a loss mask: prompts are masked, trained turns include their end-of-turn token.

The mask does not depend on ``{% generation %}`` marks, which most chat templates lack: each assistant turn is found by
rendering the conversation up to it, with the generation prompt, and through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapter_format.messages import plain_messages

IGNORED = -100


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
    """Character spans of the assistant's turns in ``text``, from after the generation prompt through the end of turn.

    A turn with ``"weight": 0`` is left out, as in OpenAI's training files.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        before = _render(tokenizer, messages[:number], tools, prompt=True)
        through = _render(tokenizer, messages[: number + 1], tools)
        if not text.startswith(before) or not text.startswith(through):
            raise MaskingError(
                f"messages[{number}]: the chat template renders this turn differently when more turns follow; "
                "train the conversation up to this turn as an example of its own"
            )
        end = _after_end_of_turn(tokenizer, text, len(before), len(through))
        if end is None:
            raise MaskingError(
                f"messages[{number}]: the chat template ends this turn without the end-of-turn token "
                f"{tokenizer.eos_token!r}, so the model would never learn to stop; fix the template or the eos_token"
            )
        spans.append((len(before), end))
    return spans


def _after_end_of_turn(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> int | None:
    """The end of the turn's end-of-turn token; what the template writes after it (such as a newline) is not trained."""
    at = text.rfind(str(tokenizer.eos_token), start, end)
    return None if at < 0 else at + len(str(tokenizer.eos_token))
