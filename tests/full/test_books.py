"""The trainer's cleaning on books as they are published, with their licences, credits and tables of contents."""

from __future__ import annotations

from pathlib import Path

from trainer.books import read_folder


def test_what_is_left_of_a_book_is_its_prose(books: Path) -> None:
    for title, prose in read_folder(books):
        assert len(prose) > 10_000, title
        assert "gutenberg" not in prose.lower(), title
        assert "\r" not in prose, title
