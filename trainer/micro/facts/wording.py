"""Small helpers of English wording."""

from __future__ import annotations

from collections.abc import Sequence

VOWELS = "aeiou"
SOUNDED_AS_CONSONANT = ("uni", "use", "one ", "euro", "ukulele", "once")
SILENT_H = ("hour", "honest", "heir")


def with_article(phrase: str) -> str:
    """The phrase with ``a`` or ``an`` before it."""
    lowered = phrase.lower()
    vowel = lowered[0] in VOWELS and not lowered.startswith(SOUNDED_AS_CONSONANT)
    return f"{'an' if vowel or lowered.startswith(SILENT_H) else 'a'} {phrase}"


def capitalised(text: str) -> str:
    """The text with its first letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def uncapitalised(text: str) -> str:
    """The text with its first letter in lower case, unless its first word is ``I``."""
    return text if text.split(" ")[0] in ("I", "I'm") else text[:1].lower() + text[1:]


def joined(items: Sequence[str], word: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"
