"""What a request's ``model`` may say beside a plain name: a version, a weight, and several adapters at once.

``model = ref ("+" ref){0,3}`` and ``ref = name ["@" version] [":" weight]``, as in ``helpdesk@ab12:0.7+json``. A
version is the beginning of a version digest, a weight scales the adapter's delta.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import InvalidRequest, ModelNotFound

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_MODEL_CHARS, MAX_PARTS, MAX_SCALE, MAX_WEIGHT_CHARS = 1024, 4, 2.0, 12
SIGNS = "@:+"
"""What has a meaning in a model text, so that a name with one of them is used only as a whole."""
_VERSION = re.compile(r"[0-9A-Fa-f]{4,64}")
_WEIGHT = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True)
class ModelRef:
    """One adapter of a composition; ``version`` is the beginning of a version digest, without it the current one."""

    name: str
    version: str | None = None
    scale: float = 1.0


def is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None


def parse_model(text: str, *, is_model: Callable[[str], bool] = is_name) -> tuple[ModelRef, ...]:
    """The adapters that a model text names, in its order. ``is_model`` tells which names are possible.

    Raises ``ModelNotFound`` for what is neither a name nor tries to be more than one, and ``InvalidRequest`` that says
    which piece is wrong. That they exist is not checked.
    """
    if not any(sign in text for sign in SIGNS):
        if not is_model(text):
            raise ModelNotFound(text[:200])
        return (ModelRef(text),)
    if len(text) > MAX_MODEL_CHARS:
        raise _invalid(f"it has {len(text)} characters; at most {MAX_MODEL_CHARS} are allowed")
    pieces = text.split("+")
    if len(pieces) > MAX_PARTS:
        raise _invalid(f"it joins {len(pieces)} adapters with '+'; at most {MAX_PARTS} are allowed")
    refs = tuple(_ref(piece, is_model) for piece in pieces)
    seen: set[tuple[str, str | None]] = set()
    for ref, piece in zip(refs, pieces, strict=True):
        if (ref.name, ref.version) in seen:
            raise _invalid(f"{_shown(piece)} names an adapter that stands in it already; once is allowed")
        seen.add((ref.name, ref.version))
    return refs


def _ref(piece: str, is_model: Callable[[str], bool]) -> ModelRef:
    if not piece:
        raise _invalid("there is nothing before or after a '+'; an adapter's name is expected on both sides")
    address, colon, weight = piece.partition(":")
    name, at, version = address.partition("@")
    if not is_model(name):
        raise _invalid(
            f"{_shown(name)} is no adapter's name; allowed are letters, digits, '.', '_' and '-', the first a "
            "letter or digit, 128 at most"
        )
    if at and not _VERSION.fullmatch(version):
        raise _invalid(f"{_shown(version)} after '@' is no version; allowed are the first 4 to 64 hex digits of one")
    return ModelRef(name, version.lower() if at else None, _scale(weight) if colon else 1.0)


def _scale(weight: str) -> float:
    if len(weight) <= MAX_WEIGHT_CHARS and _WEIGHT.fullmatch(weight):
        scale = float(weight) + 0.0  # -0 becomes 0
        if abs(scale) <= MAX_SCALE:
            return scale
    raise _invalid(
        f"{_shown(weight)} after ':' is no weight; allowed are plain numbers from -2 to 2 like 0.7, of at most "
        f"{MAX_WEIGHT_CHARS} characters"
    )


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid 'model': {reason}.", param="model")


def _shown(text: str) -> str:
    return repr(text[:80])
