"""Messages or plain text to prompt token ids, with the base's tokenizer and chat template."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

from jinja2 import Environment, TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from adapter_format.messages import Message, plain_messages
from server.adapters.content.added_tokens import AddedToken
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.templates import default_template
from server.errors import InvalidRequest, PromptTooLong
from server.text.chat_prompt import ChatPrompts
from server.text.grammar.tokenizer import GrammarTokenizer
from server.text.prompt_bound import max_prompt_bytes
from server.text.template_process import TemplateLimitExceeded
from server.text.token_texts import TokenTexts
from server.text.tools.families import HERMES
from server.text.tools.tool import ToolFormat

_Key = tuple[tuple[AddedToken, ...], bool]

MAX_TOKENIZERS = 8
"""Tokenizers kept for adapters with added tokens; each takes as much memory as the base's."""

_MARKER_TOKENS = 64
"""Tokens at the end of a prompt in which a marker of several tokens is looked for."""
_ADDED_TOKENS = '"added_tokens":'
_MAX_TEMPLATE_MESSAGE = 300


class PromptRenderer:
    """Renders prompts with one tokenizer; safe to call from several threads.

    ``chat_template`` is the tokenizer's, the default one if it has several. Token ids are below ``vocab_size``.
    The renderers of adapters with added tokens are cached, the last ``MAX_TOKENIZERS`` of them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int | None = None,
        hidden_ids: frozenset[int] = frozenset(),
        max_model_len: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self.chat_template = default_template(tokenizer.chat_template)
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        special = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._hidden_ids = hidden_ids  # hidden in answers although the tokenizer does not know them as special
        self._special_ids = frozenset([*tokenizer.all_special_ids, *special, *hidden_ids])
        self._adapters: OrderedDict[_Key, PromptRenderer] = OrderedDict()
        self._chats = ChatPrompts(tokenizer)
        self._lock = threading.Lock()
        self._build_lock = threading.Lock()
        # transformers warns of "indexing errors" at a long text; the length is checked where a sequence is submitted.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        tokenizer("x")  # a tokenizer drops truncation and padding of its file at its first call: here, in one thread

    def for_adapter(self, defaults: GenerationDefaults) -> PromptRenderer:
        """The renderer of an adapter: this one, or one with the adapter's added tokens.

        The base's template does not know a special token of the adapter's. With that template messages may write such
        tokens, which would otherwise be in no prompt. The first call for an adapter takes as long as loading the
        base's tokenizer. Raises ``ValueError`` if the tokens cannot be added.
        """
        if not defaults.added_tokens:
            return self
        by_messages = defaults.chat_template in (None, self.chat_template)
        key = (defaults.added_tokens, by_messages)
        renderer = self._cached(key)
        if renderer is not None:
            return renderer
        with self._build_lock:  # one at a time: each takes seconds, and as much memory as the base's tokenizer
            renderer = self._cached(key)
            if renderer is None:
                renderer = self._with_tokens(defaults.added_tokens, by_messages=by_messages)
                self._cache(key, renderer)
            return renderer

    def _cached(self, key: _Key) -> PromptRenderer | None:
        with self._lock:
            if key in self._adapters:
                self._adapters.move_to_end(key)
            return self._adapters.get(key)

    def _cache(self, key: _Key, renderer: PromptRenderer) -> None:
        with self._lock:
            self._adapters[key] = renderer
            while len(self._adapters) > MAX_TOKENIZERS:
                self._adapters.popitem(last=False)

    def _with_tokens(self, tokens: tuple[AddedToken, ...], *, by_messages: bool) -> PromptRenderer:
        base_tokens = self._tokenizer.added_tokens_encoder
        added, hidden_ids = [], []
        for token in tokens:
            if by_messages and token.special and token.content not in base_tokens:
                added.append(replace(token, special=False))
                hidden_ids.append(token.id)
            else:
                added.append(token)
        tokenizer = _with_added_tokens(self._tokenizer, added)
        return PromptRenderer(
            tokenizer, vocab_size=self.vocab_size, hidden_ids=frozenset(hidden_ids), max_model_len=self._max_model_len
        )

    def check_defaults(self, defaults: GenerationDefaults) -> None:
        """Raises ``ValueError`` if an adapter's end tokens, added tokens or chat template cannot be used."""
        prompts = self.for_adapter(defaults)
        prompts.check_end_tokens(defaults.end_tokens)
        prompts.check_template(defaults.chat_template, defaults.chat_template_kwargs)

    def token_id(self, text: str) -> int | None:
        """The id of a special token, which is never shown in an answer; None for any other text."""
        token_id = self._tokenizer.added_tokens_encoder.get(text)
        return token_id if token_id in self._special_ids else None

    def end_token_id(self, token: str | int) -> int | None:
        """The id of an end token given as text or id; None if the base has no such token."""
        if isinstance(token, int):
            return token if token < self.vocab_size else None
        token_id = self._tokenizer.convert_tokens_to_ids(token)  # None or the unknown token's id for an unknown text
        if not isinstance(token_id, int) or self._tokenizer.convert_ids_to_tokens(token_id) != token:
            return None
        return token_id

    def check_end_tokens(self, tokens: Iterable[str | int]) -> None:
        """Raises ``ValueError`` if an end token is not a token of the base, because answers would never end at it."""
        for token in tokens:
            if self.end_token_id(token) is None:
                raise ValueError(
                    f"end_tokens in quickchange.json names {token!r}, which is no token of the base and no id below "
                    f"{self.vocab_size}: name the token that ends a turn"
                )

    def check_template(self, template: str | None, variables: Mapping[str, Any] | None = None) -> None:
        """Raises ``ValueError`` if a chat template is invalid, or does not render the simplest conversation.

        None is the base's template, which is tried with an adapter's ``variables``. ``**`` is refused, because a power
        of large numbers is one call into C, which no deadline interrupts and which blocks every other thread.
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
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        tools: Mapping[str, Any] | None = None,
        tool_format: ToolFormat = HERMES,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Prompt ids of a conversation, by the base's template or by ``template``.

        ``variables`` are names and values for the template, ``tools`` those in which it takes tools. Earlier calls are
        written in ``tool_format`` for a template that does not take them. Text of a message or variable that looks
        like a special token stays text: only the template writes special tokens.
        Raises ``InvalidRequest`` with the template's message if the template refuses the conversation.
        """
        current = self._tokenizer.chat_template
        used = template or (current if isinstance(current, str) else self.chat_template)
        if not used:
            raise InvalidRequest("The base model has no chat template: use /v1/completions.", param="messages")
        values = {**(variables or {}), **(tools or {}), "add_generation_prompt": add_generation_prompt}
        plain = plain_messages(messages, used)
        contents = [content for message in plain if isinstance(content := message.get("content"), str)]
        self._check_length(*contents, param="messages")
        try:
            ids = self._chats.ids(plain, used, values, tool_format, continues=continue_final_message)
        except TemplateLimitExceeded:
            raise InvalidRequest(
                "The chat template takes too long or too much memory with these messages.", param="messages"
            ) from None
        except (OSError, MemoryError):  # no process for the template: the messages are not to blame
            raise
        except Exception as error:  # a template is a program, and its text anything
            raise InvalidRequest(
                f"The chat template refuses these messages: {_short_message(error)}", param="messages"
            ) from error
        if not ids:
            raise InvalidRequest("The chat template renders these messages to an empty prompt.", param="messages")
        return ids

    def takes_system_turn(self, template: str) -> bool:
        """Whether a chat template shows a system turn; some refuse it."""
        return self._chats.takes_system_turn(template)

    def prompt_ids(self, prompt: str | list[int], *, param: str = "prompt") -> list[int]:
        """A text as token ids; token ids as they are. ``param`` is the field that has it."""
        if isinstance(prompt, str):
            return self.completion(prompt, param=param)
        if max(prompt) >= self.vocab_size:
            raise InvalidRequest(f"Invalid '{param}': token ids should be below {self.vocab_size}.", param=param)
        return prompt

    def text_ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """A text as token ids, with the tokens that the tokenizer puts around a text or without."""
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def token_names(self, ids: Sequence[int]) -> list[str]:
        """The names of tokens in the vocabulary, in which a space may be another character."""
        return [str(name) for name in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def completion(self, text: str, *, param: str = "prompt") -> list[int]:
        """Prompt ids of a text to continue; of an empty text, the token that begins a text."""
        self._check_length(text, param=param)
        ids = list(self._tokenizer(text)["input_ids"])
        if ids:
            return ids
        bos_token_id = self._tokenizer.bos_token_id
        if bos_token_id is None:
            raise InvalidRequest("The prompt is empty, and the base model has no token to begin with.", param=param)
        return [bos_token_id]

    def _check_length(self, *texts: str, param: str) -> None:
        """Raises ``PromptTooLong`` if texts are longer than any that fit into the context."""
        limit = self._max_model_len
        if limit is None or sum(map(len, texts)) <= limit or self._max_prompt_bytes is None:
            return
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if num_bytes > self._max_prompt_bytes:
            raise PromptTooLong(num_bytes, max_bytes=self._max_prompt_bytes, limit=limit, param=param)

    @cached_property
    def _max_prompt_bytes(self) -> int | None:
        return (
            None
            if self._max_model_len is None
            else max_prompt_bytes(self._tokenizer.backend_tokenizer, self._max_model_len)
        )

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(
            self.decode,
            name_of=lambda token_id: str(self._tokenizer.convert_ids_to_tokens(token_id)),
            special_ids=self._special_ids,
            context_ids=self._tokenizer("a", add_special_tokens=False)["input_ids"],
        )

    @cached_property
    def grammar_tokenizer(self) -> GrammarTokenizer:
        """The tokenizer for grammars; the first use takes as long as loading it, and is not for the event loop."""
        eos_id = self._tokenizer.eos_token_id
        return GrammarTokenizer(
            self._tokenizer.backend_tokenizer.to_str(),
            vocab_size=self.vocab_size,
            special_ids=self._special_ids,
            eos_id=min(self._special_ids, default=self.vocab_size - 1) if eos_id is None else eos_id,
        )

    def ends_inside(self, ids: Sequence[int], begin: str, end: str) -> bool:
        """Whether a prompt ends behind ``begin`` and before ``end``, markers such as those of reasoning."""
        tokens = (self.end_token_id(begin), self.end_token_id(end))
        if None not in tokens:
            begun, ended = (len(ids) - ids[::-1].index(token) if token in ids else 0 for token in tokens)
            return begun > ended
        text = self._decode(ids[-_MARKER_TOKENS:], self._hidden_ids)
        return text.rfind(begin) > text.rfind(end)

    def decoder(self, markers: Iterable[str]) -> Callable[[Sequence[int]], str]:
        """A function like ``decode`` that shows the special tokens among ``markers``."""
        shown = {token_id for marker in markers if (token_id := self.token_id(marker)) is not None}
        return partial(self._decode, hidden=self._special_ids - shown) if shown else self.decode

    def _decode(self, ids: Sequence[int], hidden: Set[int]) -> str:
        shown = [token_id for token_id in ids if token_id not in hidden]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def num_added(self, text: str, ids: Sequence[int]) -> int:
        """Special tokens that the tokenizer puts before a text with these ids."""
        begin = self._tokenizer.bos_token
        return int(begin is not None and ids[0] == self._tokenizer.bos_token_id and not text.startswith(begin))

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of token ids, with special tokens."""
        return self._decode(ids, frozenset())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        shown = [token_id for token_id in ids if token_id not in self._hidden_ids] if self._hidden_ids else list(ids)
        text = self._tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _with_added_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[AddedToken]) -> PreTrainedTokenizerBase:
    """The base's tokenizer with other added tokens. Raises ``ValueError`` if a token does not get its id."""
    text = tokenizer.backend_tokenizer.to_str()
    start = text.index(_ADDED_TOKENS) + len(_ADDED_TOKENS)
    _, end = json.JSONDecoder().raw_decode(text, start)
    listed = json.dumps([asdict(token) for token in tokens])
    adapted = copy.copy(tokenizer)
    try:
        adapted._tokenizer = Tokenizer.from_str(text[:start] + listed + text[end:])
    except Exception as error:  # noqa: BLE001 - the library raises no narrower one
        raise ValueError(f"its added tokens cannot be used: {_short_message(error)}") from None
    for token in tokens:
        if adapted._tokenizer.token_to_id(token.content) != token.id:
            raise ValueError(
                f"its tokenizer gives the token {token.content!r:.60} the id {token.id}, which it cannot have beside "
                "the base's vocabulary: add tokens to the base's tokenizer one after another, and train it again"
            )
    if adapted.all_special_ids != tokenizer.all_special_ids:
        raise ValueError("its tokenizer lacks special tokens of the base's: take tokenizer.json out of the folder")
    return adapted


def _operators(template: str) -> set[str]:
    """The operators in a template's expressions; none if it cannot be parsed, which compiling it will report."""
    with suppress(TemplateError):
        return {text for _, kind, text in Environment().lex(template) if kind == "operator"}
    return set()


def _short_message(error: Exception) -> str:
    """The message of an error, shortened, in printable characters."""
    message = str(error)[:_MAX_TEMPLATE_MESSAGE] or type(error).__name__
    return "".join(char if char.isprintable() else " " for char in message)
