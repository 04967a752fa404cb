"""A conversation as token ids: its messages in a form that the chat template shows, rendered, and tokenized."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from server.text.message_forms import shows, with_names_as_text, with_reasoning_as_text
from server.text.reasoning import reasoning_format
from server.text.template_process import TemplateRefusal, template_processes
from server.text.tools.history import CallForm, find_form, with_calls_as_text
from server.text.tools.tool import ToolFormat

_log = logging.getLogger("quickchange.prompt")

MAX_TEMPLATES = 64
"""Templates whose forms are kept."""
_END_MARK = "<|quickchange end of the last message|>"
"""Behind the text that the answer continues, while the template is rendered; the prompt is cut there."""

Messages = Sequence[Mapping[str, Any]]


class ChatPrompts:
    """Renders conversations with one tokenizer; safe to call from several threads.

    ``tools`` and other variables are handed to the template as they are, and so is ``add_generation_prompt``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._call_form = lru_cache(MAX_TEMPLATES)(self._find_call_form)
        self._shows = lru_cache(3 * MAX_TEMPLATES)(self._find_shown)

    def ids(
        self, messages: Messages, template: str, variables: Mapping[str, Any], format: ToolFormat, *, continues: bool
    ) -> list[int]:
        """Prompt ids. Names, reasoning and calls that the template does not show are text of their messages.

        With ``continues`` the prompt ends behind the text of the last message.
        Raises ``TemplateRefusal``, ``TemplateLimitExceeded``.
        """
        shown = self._shown(messages, template)
        if not _has_calls(shown):
            return self._ids(shown, template, variables, continues=continues)
        form = self._call_form(template)
        if form is not None:
            try:
                return self._ids(form.applied(shown), template, variables, continues=continues)
            except TemplateRefusal:
                _log.debug("the chat template refuses calls that it takes otherwise")
        return self._ids(with_calls_as_text(shown, format), template, variables, continues=continues)

    def _shown(self, messages: Messages, template: str) -> Messages:
        if any(message.get("reasoning_content") for message in messages) and not self._shows(
            template, "reasoning_content"
        ):
            messages = with_reasoning_as_text(messages, reasoning_format(template))
        if any(message.get("name") for message in messages) and not self._shows(template, "name"):
            messages = with_names_as_text(messages)
        return messages

    def _find_call_form(self, template: str) -> CallForm | None:
        return find_form(partial(self._text, template=template, variables={"add_generation_prompt": True}))

    def takes_system_turn(self, template: str) -> bool:
        """Whether a template shows a system turn; some refuse it."""
        return self._shows(template, "system")

    def _find_shown(self, template: str, key: str) -> bool:
        return shows(key, partial(self._text, template=template, variables={"add_generation_prompt": False}))

    def _ids(self, messages: Messages, template: str, variables: Mapping[str, Any], *, continues: bool) -> list[int]:
        marked = partial(self._tokenizer._mark_chat_inputs, template, tokenize=True, assistant_mask=False)
        [chat], _, _, values = marked([list(messages)], None, None, dict(variables))
        if continues:
            chat[-1]["content"] += _END_MARK
        text = self._text(chat, template=template, variables=values)
        if continues:
            text = _up_to_end(text)
        return list(self._tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"])

    def _text(self, messages: Messages, *, template: str, variables: Mapping[str, Any]) -> str:
        chat = [_for_template(message) for message in messages]
        values = {"tools": None, "documents": None, **self._tokenizer.special_tokens_map, **variables}
        return template_processes().render(template, {**values, "messages": chat})


def _has_calls(messages: Messages) -> bool:
    """Whether messages have calls or results."""
    return any(message.get("tool_calls") or message["role"] in ("tool", "function") for message in messages)


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without keys that are null; GPT-OSS' template reads reasoning under the name ``thinking``.

    A turn with calls may have null as its content, in a form of ``tools/history.py``.
    """
    may_be_null = {"content"} if message.get("tool_calls") else set()
    present = {key: value for key, value in message.items() if value is not None or key in may_be_null}
    if "reasoning_content" in present:
        present.setdefault("thinking", present["reasoning_content"])
    return present


def _up_to_end(text: str) -> str:
    if _END_MARK not in text:
        raise TemplateRefusal("it does not show the text of the last message, which cannot be continued")
    return text[: text.rindex(_END_MARK)]
