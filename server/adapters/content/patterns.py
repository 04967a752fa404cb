"""Keys of ``rank_pattern`` and ``alpha_pattern``, which PEFT takes for regular expressions over module names.

They come from strangers, so RE2 matches them: linear in the name whatever the key. What RE2 cannot compute
(lookarounds, backreferences) is refused. https://github.com/google/re2/wiki/Syntax
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import re2  # type: ignore[import-untyped]

MAX_KEYS = 2048
MAX_KEY_CHARS = 512
_MAX_BYTES_OF_A_KEY = 1 << 16


@dataclass(frozen=True)
class Pattern:
    """Numbers by key, in the file's order, which decides."""

    keys: tuple[Any, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> Pattern:
        """Compile every key. Raises ``ValueError`` that names one that cannot be."""
        if len(numbers) > MAX_KEYS:
            raise ValueError(f"it has {len(numbers)} keys; the limit is {MAX_KEYS}")
        return cls(tuple(_compile(key) for key in numbers), tuple(numbers.values()))

    def get(self, module: str, default: float) -> float:
        """The value of the first key that matches the module's name, or the end of it that follows a dot."""
        return next((value for key, value in zip(self.keys, self.values, strict=True) if key.match(module)), default)


NO_PATTERN = Pattern()


def _compile(key: str) -> Any:
    if len(key) > MAX_KEY_CHARS:
        raise ValueError(f"the key {key[:40]!r}... has {len(key)} characters; the limit is {MAX_KEY_CHARS}")
    options = re2.Options()
    options.max_mem = _MAX_BYTES_OF_A_KEY
    options.log_errors = False
    try:
        return re2.compile(rf"(.*\.)?({key})$", options)  # PEFT's own, peft.utils.other.get_pattern_key
    except re2.error as error:
        said = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
        raise ValueError(
            f"the key {key!r:.80} cannot be matched ({said}): write module names, or an expression without lookarounds "
            "and backreferences"
        ) from None
