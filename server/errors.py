"""Everything that can go wrong, as one tree of facts; ``api/errors.py`` is the only place that knows an HTTP status.

QuickchangeError
├── RequestError                what a client sent; its fault, and it can be told how to mend it
│   ├── InvalidRequest
│   ├── UnsupportedParameter
│   ├── ContextLengthExceeded
│   ├── ModelNotFound
│   ├── InvalidKey
│   └── AdminOff
├── ServiceError                what the server cannot do just now, or did wrong
│   ├── QueueFull
│   ├── AdapterPending
│   ├── AdapterNotLoaded
│   ├── EngineUnavailable
│   └── GenerationFailed
├── AdapterError                a folder that is not served, and why
│   └── AdapterRejected
└── StartError                  the server does not start
    ├── BaseModelRefused
    ├── SettingsError
    └── StartFailed

A base that is not there, or whose files cannot be read, is an error of ``base_files.errors``, a tree of its own that
the trainer shares. No request can raise one: ``__main__`` shows it as it shows a ``StartError``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_LINE = 900


def one_line(text: str) -> str:
    """Somebody's text in characters that a line of a log and a JSON body can hold, and not too many of them."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:MAX_LINE])
    return shown if len(text) <= MAX_LINE else f"{shown}..."


def first(names: Sequence[str], separator: str = ", ") -> str:
    """The first three of a list, and how many more."""
    shown = separator.join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


_PATH = re.compile(
    r"""(?P<quote>['"])/(?:(?!(?P=quote))[^\\]|\\.)*(?P=quote)"""  # as repr writes it
    r"""|['"]/.{198}"""  # as repr writes it, cut off after 200 characters
    r"""|(?<![^\s(=['"])/[^\s'",;:)\]]+"""
)


def without_paths(text: str) -> str:
    """A sentence for clients, who need not know where the server's files are: absolute paths are left out."""
    return _PATH.sub("(a path on the server)", text)


class QuickchangeError(Exception):
    """The root. ``str(error)`` is a sentence for the person who can mend it."""


class RequestError(QuickchangeError):
    """A request that cannot be served; ``param`` is the path of the field at fault, as in ``messages[2].content``."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field that is missing, of the wrong type or out of range; ``code`` is OpenAI's word for it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = "invalid_value") -> None:
        super().__init__(message, param=param)
        self.code = code


class UnsupportedParameter(RequestError):
    """A field that would change the answer, which this server does not honour, and so refuses."""

    def __init__(self, param: str, message: str | None = None) -> None:
        super().__init__(message or f"Unsupported parameter: '{param}' is not supported by this server.", param=param)


class ContextLengthExceeded(RequestError):
    """Prompt and completion together do not fit."""

    def __init__(self, *, limit: int, prompt_tokens: int, completion_tokens: int, param: str = "messages") -> None:
        self.limit, self.prompt_tokens, self.completion_tokens = limit, prompt_tokens, completion_tokens
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the {param}, {completion_tokens} in the "
            f"completion). Please reduce the length of the {param} or completion.",
            param=param,
        )


class ModelNotFound(RequestError):
    """No base and no adapter of this name that is served; ``refused`` says why the folder of this name is not."""

    def __init__(self, model: str, *, refused: str | None = None) -> None:
        self.model, self.refused = model, refused
        super().__init__(
            f"The model `{model}` does not exist or you do not have access to it."
            if refused is None
            else f"The adapter `{model}` is not served: {without_paths(refused)}",
            param="model",
        )


class InvalidKey(RequestError):
    """No key, or a wrong one, where one is wanted."""

    def __init__(self) -> None:
        super().__init__("This needs the server's admin key: send it as 'Authorization: Bearer KEY'.")


class AdminOff(RequestError):
    """The server takes no changes over HTTP."""

    def __init__(self) -> None:
        super().__init__("Changing adapters over HTTP is off: start the server with QUICKCHANGE_ADMIN_KEY set.")


class ServiceError(QuickchangeError):
    """Not the client's fault."""


class QueueFull(ServiceError):
    """As many sequences wait as may."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"The server is busy: {limit} generations are queued already. Try again later.")


class AdapterPending(ServiceError):
    """An adapter whose folder changed, and was not read again yet."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        super().__init__(f"The adapter '{adapter}' changed and is being read again. Try again in a moment.")


class AdapterNotLoaded(ServiceError):
    """An adapter that could not be brought into memory: there is not enough of it, or a bug."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        super().__init__(f"The adapter '{adapter}' could not be loaded into memory. Try again later.")


class EngineUnavailable(ServiceError):
    """The engine stopped, or is stopping; nothing more is generated."""


class GenerationFailed(ServiceError):
    """One generation could not go on; others were not disturbed."""


class AdapterError(QuickchangeError):
    """An adapter folder that is not served. What it holds is somebody else's text: the reason is one plain line."""

    def __init__(self, adapter: str, reason: str) -> None:
        self.adapter, self.reason = adapter, one_line(reason)
        super().__init__(f"adapter {adapter!r}: {self.reason}")


class AdapterRejected(AdapterError):
    """The folder is wrong and stays so until somebody changes it."""


class StartError(QuickchangeError):
    """The server does not start."""


class BaseModelRefused(StartError):
    """The base's architecture does not come out right in a flat batch; serving it would be silently wrong."""

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(f"base model {model!r} is refused: {reason}")


class SettingsError(StartError):
    """A setting that cannot be used on this machine or with this base."""


class StartFailed(StartError):
    """A part of the server that could not be started; the log above has where."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"the server did not start, and nothing of it is left running: {type(error).__name__}: {error}"
        )
