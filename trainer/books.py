"""Cleaning of public-domain books: only the prose is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_START = re.compile(r"^\s*(?:\*\*\* ?START OF|\*END ?\*? ?THE SMALL PRINT!).*$", re.MULTILINE)
_END = re.compile(r"^\s*(?:\*\*\* ?END OF|End of (?:the )?Project Gutenberg).*$", re.MULTILINE | re.IGNORECASE)
_ILLUSTRATION = re.compile(r"\[(?:Illustration|Footnote|Sidenote|Transcriber)[^\]]*\]", re.IGNORECASE)
_CREDIT = re.compile(r"^(?:Produced by|E-text prepared by|Transcribed|Etext|This etext)", re.IGNORECASE)
_PLAIN = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-", "\u2026": "...",
    "\ufeff": "", "\u00a0": " ", "\u00ad": "",
})  # fmt: skip


def clean(raw: str) -> str:
    """The prose of a Gutenberg file: paragraphs of one line each, a blank line between them.

    Removed: text before the start marker and after the end marker, credits, illustrations, tables of contents, headings
    and other short lines without a sentence. Typographic quotes and dashes become ASCII.
    """
    text = raw.replace("\r\n", "\n").translate(_PLAIN)
    if start := _START.search(text):
        text = text[start.end() :]
    if end := _END.search(text):
        text = text[: end.start()]
    text = _ILLUSTRATION.sub("", text)
    paragraphs = (_paragraph(block) for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _paragraph(block: str) -> str:
    """The block on one line; empty where it is not prose."""
    line = re.sub(r"\s+", " ", block).replace("_", "").strip()
    if len(line) < 25 or _CREDIT.match(line) or line.upper() == line or line[-1] not in ".!?\"')-:;,":
        return ""
    return line


def read_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """(title, prose) of each ``.txt`` file, by name.

    Raises ``FileNotFoundError`` where there is none: a base without prose would be another model.
    """
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"no .txt books in {folder}: name a folder of plain-text books")
    for path in paths:
        yield path.stem, clean(path.read_text(encoding="utf-8", errors="replace"))
