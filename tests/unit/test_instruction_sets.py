"""Tests of what this CPU lacks are left out and named, and another CPU can be put in its place."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping

import pytest

from tests import instruction_sets
from tests.instruction_sets import NUMBA, Selection, needs, variables_of
from tests.serving import ROOT


class Item:
    """A test with some marks, as pytest collects it."""

    def __init__(self, *marks: pytest.MarkDecorator) -> None:
        self._marks = marks

    def iter_markers(self, name: str) -> Iterator[pytest.Mark]:
        return (one.mark for one in self._marks if one.name == name)


@pytest.fixture(autouse=True)
def _a_cpu_with_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_sets, "on_this_cpu", lambda: frozenset([NUMBA, "AVX-VNNI"]))


def test_tests_that_need_what_is_not_there_are_dropped_and_named() -> None:
    plain, both, tiles = Item(), Item(needs(NUMBA), needs("AVX-VNNI")), Item(needs(NUMBA), needs("AMX"))
    either = Item(needs("AVX-VNNI", "AMX"))
    selection = Selection([plain, both, tiles, either])
    assert selection.kept == [plain, both, either] and selection.dropped == [tiles]
    told = selection.told()
    assert told is not None and told.startswith("instruction sets tested: torch's ")
    assert told.endswith(", Numba, AVX-VNNI; not on this CPU: AMX")


def test_where_all_is_there_nothing_is_said_to_be_missing_and_where_nothing_is_asked_nothing_is_said() -> None:
    told = Selection([Item(needs("AVX-VNNI"))]).told()
    assert told is not None and told.endswith(", AVX-VNNI")
    assert Selection([Item()]).told() is None


SKIPS = re.compile(r"pytest\.(mark\.)?(skip|skipif|importorskip|xfail)\b")


def test_no_test_is_skipped_or_ends_before_it_has_asserted_anything() -> None:
    """One test of attention returned on every CPU without tiles, and passed."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        wrong += [f"{path}: {match[0]}" for match in SKIPS.finditer(text)]
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                asserted = min((one.lineno for one in ast.walk(node) if isinstance(one, ast.Assert)), default=10**9)
                wrong += [f"{path}:{line}: return in {node.name}" for line in returns_of(node) if line < asserted]
    assert wrong == []


def returns_of(node: ast.AST) -> Iterator[int]:
    """Lines with a return of the function itself, not of one that is defined in it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child.lineno
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from returns_of(child)


@pytest.mark.parametrize("cpu", ["avx2", "avx512"])
def test_make_runs_pytest_as_on_another_cpu(cpu: str) -> None:
    done = make(cpu)
    assert done.returncode == 0
    (line,) = (line.split("/pytest")[0] for line in done.stdout.splitlines() if "/pytest " in line)
    words: Mapping[str, str] = dict(word.split("=", 1) for word in line.split()[:-1])
    assert words == variables_of(cpu) and words["ATEN_CPU_CAPABILITY"] == cpu


def test_make_refuses_a_cpu_that_it_does_not_know() -> None:
    done = make("z80")
    assert done.returncode != 0 and "CPU is 'z80': avx2, avx512, or nothing" in done.stderr


def make(cpu: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("make")
    assert tool is not None
    return subprocess.run(
        [tool, "-n", "test", f"CPU={cpu}", "PYTHON=python3"], cwd=ROOT, capture_output=True, text=True
    )
