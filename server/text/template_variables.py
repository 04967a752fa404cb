"""The variables of a chat template that a request may set: those that it reads and the server does not set."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables

from adapter_format.sidecar import RESERVED_VARIABLES
from server.adapters.content.templates import template_environment
from server.errors import InvalidRequest

THINKING = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"
_SHOWN = 20
_NOT_OF_REQUESTS = RESERVED_VARIABLES | {
    "dict", "namespace", "raise_exception", "strftime_now", "xml_tools",
    "bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token", "unk_token",
    "additional_special_tokens", "image_token", "audio_token", "video_token",
}  # fmt: skip


class TemplateVariables(NamedTuple):
    """Names and values for a template, and the fields of the request that the template has no variable for."""

    values: Mapping[str, Any]
    unused_fields: tuple[str, ...] = ()


@lru_cache(maxsize=64)
def variables_of(template: str) -> frozenset[str]:
    """The variables of a template that a request may set; none if the template cannot be parsed."""
    environment = template_environment()
    try:
        names = find_undeclared_variables(environment.parse(template))
    except (TemplateError, RecursionError):
        return frozenset()
    return frozenset(names - _NOT_OF_REQUESTS - set(environment.globals))


def requested_variables(
    template: str, kwargs: Mapping[str, Any], *, thinking: bool | None, effort: str | None
) -> TemplateVariables:
    """The variables that a request sets. Raises ``InvalidRequest`` for one that the template does not read.

    ``effort`` is the template's variable of this name; where there is none, ``none`` turns thinking off, and any other
    effort turns it on.
    """
    names = variables_of(template)
    for name in kwargs:
        if name not in names:
            raise _unknown(names)
    values: dict[str, Any] = {}
    unused = []
    switches = [name for name in THINKING if name in names]
    if effort is not None:
        if EFFORT in names:
            values[EFFORT] = effort
        if effort == "none" or EFFORT not in names:
            values |= dict.fromkeys(switches, effort != "none")
        if EFFORT not in names and not switches:
            unused.append(EFFORT)
    if thinking is not None:
        values |= dict.fromkeys(switches, thinking)
        if not switches:
            unused.append(THINKING[0])
    return TemplateVariables({**values, **kwargs}, tuple(unused))


def _unknown(names: frozenset[str]) -> InvalidRequest:
    known = ", ".join(f"'{name}'" for name in sorted(names)[:_SHOWN])
    has = f"has the variables {known}" if known else "has no variables"
    return InvalidRequest(
        f"Invalid 'chat_template_kwargs': the chat template of this model {has}.",
        param="chat_template_kwargs",
        code="unsupported_parameter",
    )
