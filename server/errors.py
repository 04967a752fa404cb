"""The server's errors, as one tree; only ``api/errors.py`` knows their HTTP status.

QuickchangeError
├── RequestError                the request is wrong; the message says how to correct it
│   ├── InvalidRequest
│   ├── UnsupportedParameter
│   ├── ContextLengthExceeded
│   ├── PromptTooLong
│   ├── BodyTooLarge
│   ├── TooManySequences
│   ├── ModelNotFound
│   ├── InvalidKey
│   ├── InsufficientPermissions
│   ├── RateLimitExceeded
│   ├── QueueShareFull
│   ├── ConcurrencyLimitExceeded
│   ├── TooManyWrongKeys
│   ├── HostNotAllowed
│   └── AdminOff
├── ServiceError                the server cannot serve a correct request now, or failed
│   ├── QueueFull
│   ├── QueueTimeout
│   ├── ServerOverloaded
│   ├── AdapterPending
│   ├── AdapterNotLoaded
│   ├── EngineUnavailable
│   └── GenerationFailed
├── AdapterError                an adapter folder that is not served
│   └── AdapterRejected
└── StartError                  the server does not start
    ├── BaseModelRefused
    ├── SettingsError
    └── StartFailed

Missing or unreadable files of a base are errors of ``base_files.errors``, a tree that the trainer shares. No request
raises one; ``__main__`` prints them like a ``StartError``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_LINE = 900


def one_line(text: str) -> str:
    """Text from outside as one printable line of limited length, for logs and JSON bodies."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:MAX_LINE])
    return shown if len(text) <= MAX_LINE else f"{shown}..."


def first(names: Sequence[str], separator: str = ", ") -> str:
    """The first three names of a list, and the number of the others."""
    shown = separator.join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


_PATH = re.compile(
    r"""(?P<quote>['"])/(?:(?!(?P=quote))[^\\]|\\.)*(?P=quote)"""  # as repr writes it
    r"""|['"]/.{198}"""  # as repr writes it, cut off after 200 characters
    r"""|(?<![^\s(=['"])/[^\s'",;:)\]]+"""
)


def without_paths(text: str) -> str:
    """A sentence for clients without the absolute paths of the server's files."""
    return _PATH.sub("(a path on the server)", text)


class QuickchangeError(Exception):
    """The root. ``str(error)`` is a sentence for the person who can correct the cause.

    ``retry_after`` is the time in seconds after which the same request may succeed, where the error knows it.
    """

    retry_after: float | None = None


class RequestError(QuickchangeError):
    """A wrong request; ``param`` is the path of the wrong field, such as ``messages[2].content``."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field that is missing, of the wrong type or out of range; ``code`` is OpenAI's error code."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = "invalid_value") -> None:
        super().__init__(message, param=param)
        self.code = code


class UnsupportedParameter(RequestError):
    """A field that would change the answer, and is not supported."""

    def __init__(self, param: str, message: str | None = None) -> None:
        super().__init__(message or f"Unsupported parameter: '{param}' is not supported by this server.", param=param)


class ContextLengthExceeded(RequestError):
    """Prompt and completion together do not fit."""

    def __init__(self, *, limit: int, prompt_tokens: int, completion_tokens: int, param: str = "messages") -> None:
        self.limit = limit
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the {param}, {completion_tokens} in the "
            f"completion). Please reduce the length of the {param} or completion.",
            param=param,
        )


class PromptTooLong(RequestError):
    """A prompt whose text is longer than any that fits into the context; it was not tokenized."""

    def __init__(self, num_bytes: int, *, max_bytes: int, limit: int, param: str) -> None:
        self.num_bytes, self.max_bytes, self.limit = num_bytes, max_bytes, limit
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, your {param} have {num_bytes} bytes of "
            f"text, and {limit} tokens have at most {max_bytes}. Please reduce the length of the {param}.",
            param=param,
        )


class BodyTooLarge(RequestError):
    """A body with more fields, arrays or levels than any that can be answered; it was not validated."""

    def __init__(self, got: str, limit: str) -> None:
        super().__init__(f"The request body has {got}, and this server reads at most {limit}: send less at once.")


class TooManySequences(RequestError):
    """A request for more sequences than the server ever computes and queues."""

    def __init__(self, num_sequences: int, limit: int) -> None:
        self.num_sequences, self.limit = num_sequences, limit
        super().__init__(
            f"This request asks for {num_sequences} sequences, and this server takes at most {limit}: send fewer "
            "prompts, or lower 'n' or 'best_of'.",
            param="n",
        )


class ModelNotFound(RequestError):
    """Neither the base nor a served adapter has this name.

    ``refused`` is why a folder of this name is not served; ``nearest`` are names to use instead.
    """

    def __init__(self, model: str, *, refused: str | None = None, nearest: Sequence[str] = ()) -> None:
        self.model, self.refused = model, refused
        message = f"The model `{model}` does not exist or you do not have access to it."
        if refused is not None:
            message = f"The adapter `{model}` is not served: {without_paths(refused)}"
        elif nearest:
            message += f" Nearest: {', '.join(f'`{name}`' for name in nearest)}."
        super().__init__(message, param="model")


class InvalidKey(RequestError):
    """The API key is missing or wrong. It is never repeated."""

    def __init__(self) -> None:
        super().__init__("The API key is missing or wrong: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")


class InsufficientPermissions(RequestError):
    """The API key is right, and does not open this."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        super().__init__(f"This API key may not do this: it does not have the scope '{scope}'.")


class RateLimitExceeded(RequestError):
    """The key has sent its requests of this minute."""

    limit_name = "requests_per_minute"

    def __init__(self, limit: int, *, retry_after: float) -> None:
        self.limit, self.retry_after = limit, retry_after
        super().__init__(f"This API key may send {limit} requests a minute, and has sent them. Try again later.")


class ConcurrencyLimitExceeded(RequestError):
    """The key has its maximum of requests running."""

    limit_name = "max_concurrent"

    def __init__(self, limit: int) -> None:
        self.limit, self.retry_after = limit, 1.0
        super().__init__(f"This API key may have {limit} requests running, and has them. Wait for one to end.")


class AdapterBusy(RequestError):
    """An adapter, or the maximum number of adapters, is being loaded or unloaded."""

    def __init__(self, name: str) -> None:
        self.retry_after = 1.0
        super().__init__(f"The adapter '{name}' is being loaded or unloaded, or many others are. Try again later.")


class VersionMoved(RequestError):
    """The content of a folder, or the version that is served, is not the expected one."""

    def __init__(self, name: str, *, found: str) -> None:
        super().__init__(
            f"The adapter '{name}' has another version than the expected one, {found[:12]}. Nothing was changed.",
            param="expected_digest",
        )


class QueueShareFull(RequestError):
    """A key has its share of the running and queued sequences, while there is room for other keys."""

    def __init__(self, limit: int, *, retry_after: float) -> None:
        self.limit, self.retry_after = limit, retry_after
        super().__init__(f"This API key has {limit} generations running or queued, its share. Try again later.")


class TooManyWrongKeys(RequestError):
    """Too many wrong API keys came from one address; a right one is not affected."""

    def __init__(self, *, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__("Too many wrong API keys came from this address. A right key is answered at once.")


class HostNotAllowed(RequestError):
    """The ``Host`` header is missing or malformed, or has a name that this server does not have."""

    def __init__(self) -> None:
        super().__init__(
            "This server does not answer under the name in the request's Host header: use localhost, or start it with "
            "--allowed-host NAME."
        )


class AdminOff(RequestError):
    """Changing adapters over HTTP is off."""

    def __init__(self) -> None:
        super().__init__(
            "Changing adapters over HTTP is off: start the server with QUICKCHANGE_ADMIN_KEY set, or with a key of "
            "scope 'admin' in --api-keys."
        )


class ServiceError(QuickchangeError):
    """The server cannot serve a correct request."""


class QueueFull(ServiceError):
    """The queue has its maximum of sequences."""

    def __init__(self, limit: int, *, retry_after: float = 1.0) -> None:
        self.limit, self.retry_after = limit, retry_after
        super().__init__(f"The server is busy: {limit} generations are queued already. Try again later.")


class ServerOverloaded(ServiceError):
    """The server has too much to do before a request can be queued."""


class QueueTimeout(ServiceError):
    """A sequence that waited too long for a slot."""

    def __init__(self, seconds: float, *, retry_after: float) -> None:
        self.seconds, self.retry_after = seconds, retry_after
        super().__init__(f"The request waited {seconds:g} s in the queue. Try again later.")


class AdapterPending(ServiceError):
    """An adapter whose folder changed and has not been read again yet."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        super().__init__(f"The adapter '{adapter}' changed and is being read again. Try again in a moment.")


class AdapterNotLoaded(ServiceError):
    """An adapter that could not be loaded, for want of memory or because of a bug."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        super().__init__(f"The adapter '{adapter}' could not be loaded into memory. Try again later.")


class EngineUnavailable(ServiceError):
    """The engine is stopping or has stopped."""


class ShuttingDown(ServiceError):
    """The server ends: new requests are refused, and running ones end at the end of the time they had."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down. Send the request again.")


class GenerationFailed(ServiceError):
    """One generation failed; others are not affected."""


class AdapterError(QuickchangeError):
    """An adapter folder that is not served. The reason may quote text of the folder: it is made one printable line."""

    def __init__(self, adapter: str, reason: str) -> None:
        self.adapter, self.reason = adapter, one_line(reason)
        super().__init__(f"adapter {adapter!r}: {self.reason}")


class AdapterRejected(AdapterError):
    """The content of the folder is refused, until it changes.

    ``other_base`` names the base that an intact adapter is for, where that is not the one this server runs.
    """

    def __init__(self, adapter: str, reason: str, *, other_base: str | None = None) -> None:
        super().__init__(adapter, reason)
        self.other_base = None if other_base is None else one_line(other_base)


class StartError(QuickchangeError):
    """The server does not start."""


class BaseModelRefused(StartError):
    """The base's architecture is not computed correctly in a flat batch: its answers would be wrong."""

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(f"base model {model!r} is refused: {reason}")


class SettingsError(StartError):
    """A setting that cannot be used on this machine or with this base."""


class StartFailed(StartError):
    """A part of the server failed to start; the log has the traceback."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"the server did not start, and nothing of it is left running: {type(error).__name__}: {error}"
        )
