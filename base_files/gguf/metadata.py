"""Typed values of a GGUF's metadata, and which keys nobody has read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from base_files.gguf.header import Value


class MetadataReader:
    """Reads keys under ``prefix`` and remembers them. A key that stays unread may mean another forward pass.

    Every method raises ``ValueError`` where the key is missing and no default is given, or its value is of another
    type.
    """

    def __init__(self, metadata: Mapping[str, Value], prefix: str) -> None:
        self._metadata, self.prefix = metadata, prefix
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return self.prefix + key in self._metadata

    def is_list(self, key: str) -> bool:
        return isinstance(self._metadata.get(self.prefix + key), np.ndarray)

    def value(self, key: str) -> Value:
        """Of whatever type it is."""
        return self._value(key, None)

    def integer(self, key: str, default: int | None = None) -> int:
        """A number of 0 or more; a list with one number per layer is read where all are the same."""
        value = _same_in_every_layer(self._value(key, default))
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, "an integer of 0 or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. A float32 becomes the shortest decimal that names it: 1e-05, not 9.999999747378752e-06."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            raise self._wrong(key, "a finite number")
        single = np.float32(value)
        return float(str(single)) if float(single) == value else float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def flags(self, key: str, count: int) -> list[bool]:
        """One flag per layer."""
        value = self._value(key, None)
        if not isinstance(value, np.ndarray) or len(value) < count or not np.isin(value, (0, 1)).all():
            raise self._wrong(key, f"{count} times true or false")
        return [bool(flag) for flag in value[:count]]

    def texts(self, key: str) -> list[str]:
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, "a list of strings")
        return value

    def numbers(self, key: str, count: int) -> list[Any]:
        value = self._value(key, None)
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self._wrong(key, f"a list of {count} numbers")
        numbers: list[Any] = value.tolist()
        return numbers

    def skip(self, key: str) -> None:
        """Count a key as read that has no effect."""
        self._read.add(self.prefix + key)

    def unread(self) -> list[str]:
        """Keys under the prefix, without it."""
        return [key for key in self.names_under("") if self.prefix + key not in self._read]

    def names_under(self, key: str) -> list[str]:
        """What follows ``key`` in keys that begin with it."""
        whole = self.prefix + key
        return [name.removeprefix(whole) for name in self._metadata if name.startswith(whole)]

    def _value(self, key: str, default: Value | None) -> Value:
        self._read.add(self.prefix + key)
        value = self._metadata.get(self.prefix + key, default)
        if value is None:
            raise ValueError(f"its metadata has no {self.prefix}{key}")
        return value

    def _wrong(self, key: str, needed: str) -> ValueError:
        value = self._metadata.get(self.prefix + key)
        return ValueError(f"{self.prefix}{key} is {value!r:.60}: it must be {needed}")


def _same_in_every_layer(value: Value) -> Value:
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        first: int = value[0].item()
        return first
    return value


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a sentence, the first of many."""
    shown = ", ".join(f"{name:.80}" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
