"""docs/changing.md against the code: a list of at most five files for each change, and no name that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILES = 5
PATH = re.compile(r"[\w./<>-]+\.(?:py|md|json|yml)")
NAME = re.compile(r"\w{3,}(?:\.\w+)?")


def changes() -> dict[str, list[str]]:
    """Each section's numbered points."""
    sections = (ROOT / "docs" / "changing.md").read_text(encoding="utf-8").split("\n## ")[1:]
    found = {}
    for section in sections:
        title, _, text = section.partition("\n")
        points = re.findall(r"^\d\. (.+(?:\n   .+)*)", text, re.MULTILINE)
        found[title] = points
    return found


CHANGES = changes()


def resolved(path: str, beside: Path) -> Path:
    """A path as the page writes it: from the root, or a file beside the one that the point is about."""
    return ROOT / path if "/" in path or beside == ROOT else beside / path


def test_the_common_changes_are_there() -> None:
    assert set(CHANGES) == {
        "A format of tool calls",
        "A logits processor",
        "An endpoint that generates",
        "An endpoint that does not generate",
        "A kernel for another CPU",
        "A quantized format",
        "A training objective",
        "A metric",
        "A block type of GGUF",
        "A setting",
    }


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_touches_five_files_at_most(change: str) -> None:
    assert 0 < len(CHANGES[change]) <= MAX_FILES


@pytest.mark.parametrize("change", CHANGES)
def test_every_file_and_every_name_of_the_page_exists(change: str) -> None:
    for point in CHANGES[change]:
        quoted = re.findall(r"`([^`]+)`", point)
        paths = [resolved(text, (ROOT / quoted[0]).parent) for text in quoted if PATH.fullmatch(text)]
        assert paths and quoted[0] == re.split("`", point)[1], point
        new = [path for path in paths if path.stem == "<name>"]
        assert [str(path) for path in new if not path.parent.is_dir()] == []
        assert [str(path) for path in paths if path not in new and not path.is_file()] == []
        source = "\n".join(path.read_text(encoding="utf-8") for path in package_files(paths) if path.suffix == ".py")
        names = [text for text in quoted if NAME.fullmatch(text) and not PATH.fullmatch(text)]
        words = {word for name in names for word in name.split(".")}
        assert [word for word in words if not re.search(rf"\b{word}\b", source)] == [], point


def package_files(paths: list[Path]) -> list[Path]:
    """The files that a point names; for a new one, the files beside it, whose names it may take up."""
    return [path for each in paths for path in (sorted(each.parent.glob("*.py")) if each.stem == "<name>" else [each])]
