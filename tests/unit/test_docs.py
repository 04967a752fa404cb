"""The pages: links and their anchors lead somewhere, and the files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from base_files.gguf.architectures import ARCHITECTURES
from base_files.gguf.blocks import BLOCK_TYPES

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "deploy/README.md", ROOT / "benchmarks/README.md"]
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
SOURCE = re.compile(r"`((?:server|trainer|adapter_format|base_files|cpu_kernels|benchmarks|tests|deploy)/[\w./-]+)`")
# Pages tell of files as they were when a version was released.
HISTORY = {"CHANGELOG.md"}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_their_anchors_lead_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = SOURCE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_page_of_bases_names_every_type_of_tensors_that_is_read_in_gguf_files() -> None:
    table = (ROOT / "docs/bases.md").read_text(encoding="utf-8").partition("| types | bits")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {block_type.name for block_type in BLOCK_TYPES.values()}


def test_the_page_of_bases_names_every_architecture_that_is_read_in_gguf_files() -> None:
    table = (ROOT / "docs/bases.md").read_text(encoding="utf-8").partition("| in the file |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", table)) == set(ARCHITECTURES)
