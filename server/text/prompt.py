"""Messages or plain text to prompt token ids, by the base's own tokenizer and chat template."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from jinja2 import Environment, TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from adapter_format.messages import Message, plain_messages
from server.adapters.content.added_tokens import AddedToken
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.templates import default_template
from server.errors import InvalidRequest
from server.text.deadline import DeadlineExceeded, deadline
from server.text.token_texts import TokenTexts

_Key = tuple[tuple[AddedToken, ...], bool]

MAX_TOKENIZERS = 8
"""Tokenizers kept beside the base's, for adapters with added tokens; each takes as much memory as the base's."""

_ADDED_TOKENS = '"added_tokens":'
_MAX_TEMPLATE_MESSAGE = 300
_MAX_TEMPLATE_SECONDS = 2.0
_MAX_TEMPLATE_CHARS = 4 * 1024 * 1024


class PromptRenderer:
    """Renders with one tokenizer; safe to call from several threads.

    ``chat_template`` is the tokenizer's, of several named ones the default. Token ids are below ``vocab_size``.
    Nothing is kept between calls but the renderers of adapters with added tokens of their own, the last few of them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int | None = None,
        hidden_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self.chat_template = default_template(tokenizer.chat_template)
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._hidden_ids = hidden_ids  # special in answers, and not for the tokenizer
        self._special_ids = frozenset([*tokenizer.all_special_ids, *special, *hidden_ids])
        self._adapters: OrderedDict[_Key, PromptRenderer] = OrderedDict()
        self._lock, self._making = threading.Lock(), threading.Lock()
        tokenizer("x")  # a tokenizer with truncation or padding in its file drops them at its first call, in one thread

    def for_adapter(self, defaults: GenerationDefaults) -> PromptRenderer:
        """The renderer of an adapter, whose tokenizer may have added tokens of its own; else this one.

        A special token that only the adapter has would never be in a prompt where the template is the base's, which
        does not know it, so there messages write it. The first time takes as long as the base's tokenizer takes to
        load. Raises ``ValueError`` where it cannot be.
        """
        if not defaults.added_tokens:
            return self
        by_messages = defaults.chat_template in (None, self.chat_template)
        key = (defaults.added_tokens, by_messages)
        if (found := self._made(key)) is not None:
            return found
        with self._making:  # one after another: each takes as much memory as the base's, and seconds
            if (found := self._made(key)) is None:
                found = self._with_tokens(defaults.added_tokens, by_messages=by_messages)
                self._remember(key, found)
            return found

    def _made(self, key: _Key) -> PromptRenderer | None:
        with self._lock:
            if key in self._adapters:
                self._adapters.move_to_end(key)
            return self._adapters.get(key)

    def _remember(self, key: _Key, made: PromptRenderer) -> None:
        with self._lock:
            self._adapters[key] = made
            while len(self._adapters) > MAX_TOKENIZERS:
                self._adapters.popitem(last=False)

    def _with_tokens(self, tokens: tuple[AddedToken, ...], *, by_messages: bool) -> PromptRenderer:
        own = self._tokenizer.added_tokens_encoder
        plain = [token for token in tokens if by_messages and token.special and token.content not in own]
        tokenizer = _with_added_tokens(
            self._tokenizer, [replace(token, special=False) if token in plain else token for token in tokens]
        )
        hidden = frozenset(token.id for token in plain)
        return PromptRenderer(tokenizer, vocab_size=self.vocab_size, hidden_ids=hidden)

    def check_defaults(self, defaults: GenerationDefaults) -> None:
        """Raises ``ValueError`` where an adapter's end tokens, added tokens or chat template cannot be honoured."""
        prompts = self.for_adapter(defaults)
        prompts.check_end_tokens(defaults.end_tokens)
        prompts.check_template(defaults.chat_template, defaults.chat_template_kwargs)

    def token_id(self, text: str) -> int | None:
        """The id of a text that is one special token, which never shows in an answer."""
        found = self._tokenizer.added_tokens_encoder.get(text)
        return found if found in self._special_ids else None

    def end_token_id(self, token: str | int) -> int | None:
        """The id of a token that ends a turn, by its text or as it is; None where the base has no such token."""
        if isinstance(token, int):
            return token if token < self.vocab_size else None
        found = self._tokenizer.convert_tokens_to_ids(token)  # of an unknown text it is None or the unknown token's
        return found if isinstance(found, int) and self._tokenizer.convert_ids_to_tokens(found) == token else None

    def check_end_tokens(self, tokens: Iterable[str | int]) -> None:
        """Raises ``ValueError`` where one is no token of the base: answers would never end at it."""
        for token in tokens:
            if self.end_token_id(token) is None:
                raise ValueError(
                    f"end_tokens in quickchange.json names {token!r}, which is no token of the base and no id below "
                    f"{self.vocab_size}: name the token that ends a turn"
                )

    def check_template(self, template: str | None, variables: Mapping[str, Any] | None = None) -> None:
        """Raises ``ValueError`` where a chat template is wrong, or does not render the simplest conversation.

        None is the base's own, which is tried with an adapter's ``variables``. A power of large numbers is one call
        into C that no deadline ends, and that stops every other thread.
        """
        if template is None and not variables:
            return
        if "**" in _operators(template or ""):
            raise ValueError("its chat template uses '**', which is not allowed: write the number or the names out")
        try:
            self.chat([{"role": "user", "content": "Hello"}], template=template, variables=variables)
        except InvalidRequest as error:
            raise ValueError(f"its chat template does not work: {error}") from None

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Prompt ids of a conversation, up to where the assistant's answer begins, by the base's template or another.

        ``variables`` are at hand in the template by their names. What looks like a special token inside a message or a
        variable stays text: only the template writes special tokens.
        Raises ``InvalidRequest`` with the template's words where the template refuses the conversation.
        """
        template = None if template == self.chat_template else template  # the base may have another one for tools
        chosen = template or self._tokenizer.chat_template
        if not chosen:
            raise InvalidRequest("The base model has no chat template: use /v1/completions.", param="messages")
        plain = plain_messages(messages, chosen)
        how: dict[str, Any] = {
            **(variables or {}),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": True,
            "return_dict": False,
        }
        try:
            if template is None:
                ids = self._tokenizer.apply_chat_template(plain, sanitize_control_tokens=True, **how)
            else:
                with deadline(_MAX_TEMPLATE_SECONDS):
                    ids = self._foreign(plain, template, how)
        except DeadlineExceeded:
            raise InvalidRequest("The chat template takes too long with these messages.", param="messages") from None
        except Exception as error:  # a template is a program, and fails in every way in which programs do
            raise InvalidRequest(
                f"The chat template refuses these messages: {_words(error)}", param="messages"
            ) from error
        if not ids:
            raise InvalidRequest("The chat template makes nothing of these messages.", param="messages")
        return list(ids)

    def _foreign(self, plain: list[dict[str, Any]], template: str, how: Mapping[str, Any]) -> Any:
        """Prompt ids by a template that is not the base's; its text is measured before it becomes tokens."""
        text = self._tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False, **how)
        if len(text) > _MAX_TEMPLATE_CHARS:
            raise ValueError(f"they come to {len(text)} characters")
        return self._tokenizer.apply_chat_template(plain, chat_template=template, sanitize_control_tokens=True, **how)

    def completion(self, text: str) -> list[int]:
        """Prompt ids of a text to be continued; an empty one is the token that begins a text."""
        ids = list(self._tokenizer(text)["input_ids"])
        if ids:
            return ids
        begin = self._tokenizer.bos_token_id
        if begin is None:
            raise InvalidRequest("The prompt is empty, and the base model has no token to begin with.", param="prompt")
        return [begin]

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Texts and bytes of single tokens."""
        return TokenTexts(
            self.decode,
            name_of=lambda token_id: str(self._tokenizer.convert_ids_to_tokens(token_id)),
            special_ids=self._special_ids,
            context_ids=self._tokenizer("a", add_special_tokens=False)["input_ids"],
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        shown = [number for number in ids if number not in self._hidden_ids] if self._hidden_ids else list(ids)
        text = self._tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _with_added_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[AddedToken]) -> PreTrainedTokenizerBase:
    """The base's tokenizer with other added tokens. Raises ``ValueError`` where one does not get its id."""
    text = tokenizer.backend_tokenizer.to_str()
    start = text.index(_ADDED_TOKENS) + len(_ADDED_TOKENS)
    _, end = json.JSONDecoder().raw_decode(text, start)
    listed = json.dumps([asdict(token) for token in tokens])
    made = copy.copy(tokenizer)
    try:
        made._tokenizer = Tokenizer.from_str(text[:start] + listed + text[end:])
    except Exception as error:  # noqa: BLE001 - the library raises no narrower one
        raise ValueError(f"its added tokens cannot be used: {_words(error)}") from None
    for token in tokens:
        if made._tokenizer.token_to_id(token.content) != token.id:
            raise ValueError(
                f"its tokenizer gives the token {token.content!r:.60} the id {token.id}, which it cannot have beside "
                "the base's vocabulary: add tokens to the base's tokenizer one after another, and train it again"
            )
    if made.all_special_ids != tokenizer.all_special_ids:
        raise ValueError("its tokenizer lacks special tokens of the base's: take tokenizer.json out of the folder")
    return made


def _operators(template: str) -> set[str]:
    """The operators in a template's expressions; none where it cannot be read, which the compiler will say."""
    with suppress(TemplateError):
        return {text for _, kind, text in Environment().lex(template) if kind == "operator"}
    return set()


def _words(error: Exception) -> str:
    """What an error says, in short, in characters that a line can hold."""
    said = str(error)[:_MAX_TEMPLATE_MESSAGE] or type(error).__name__
    return "".join(char if char.isprintable() else " " for char in said)
