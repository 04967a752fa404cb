"""What can be wrong with the files of a base.

BaseFilesError
├── BaseNotFound       no base by name, no GGUF file, no folder with a model, no hub id that can be fetched
├── BaseMalformed      config.json or the weight files are missing, cut off, or not in their format; or a GGUF file asks
│                      for what is not read
├── BaseUnloadable     transformers makes no model or tokenizer of its files
└── BaseTooLarge       its weights take more memory than there is
"""

from __future__ import annotations


class BaseFilesError(Exception):
    """The root. ``str(error)`` is a sentence for the person who chose the base."""


class BaseNotFound(BaseFilesError):
    """``base_model`` is what was asked for."""

    def __init__(self, base_model: str, reason: str) -> None:
        self.base_model, self.reason = base_model, reason
        super().__init__(f"there is no base model {base_model!r}: {reason}")


class BaseMalformed(BaseFilesError):
    """``name`` is that of the base's folder or file."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"base model {name!r} cannot be read: {reason}")


class BaseUnloadable(BaseFilesError):
    """``name`` is that of the base's folder or file."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"base model {name!r} is refused: {reason}")


class BaseTooLarge(BaseFilesError):
    """``needed`` and ``available`` are bytes; ``ways_out`` is what to do."""

    def __init__(self, name: str, *, needed: int, available: int, ways_out: str) -> None:
        self.name, self.needed, self.available = name, needed, available
        super().__init__(
            f"base model {name!r} is refused before it is read: its weights take {needed:,} bytes of memory, and "
            f"{available:,} bytes are free. {ways_out}"
        )
