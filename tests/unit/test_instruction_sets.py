"""Tests of what this CPU lacks are left out and named, and another CPU can be put in its place."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from cpu_kernels.tiers import VARIABLE
from tests import instruction_sets
from tests.instruction_sets import NUMBA, Selection, needs
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


def test_make_runs_pytest_as_on_another_cpu() -> None:
    assert variables_of_make("generic") == {VARIABLE: "generic"}
    assert variables_of_make("avx2") == {VARIABLE: "avx2"}
    without_vnni = variables_of_make("avx512")
    assert without_vnni[VARIABLE] == "avx2" and without_vnni["ATEN_CPU_CAPABILITY"] == "avx512"


def test_every_library_keeps_to_the_tier_of_a_run() -> None:
    """A test's process, which ``tests/conftest.py`` sets up before it loads torch."""
    program = "import tests.conftest, torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    done = run_python(program, environment | {VARIABLE: "generic"})
    assert (done.returncode, done.stdout.strip()) == (0, "DEFAULT"), done.stderr


def test_a_run_on_a_cpu_that_this_is_not_is_refused_by_name() -> None:
    done = run_python("import tests.conftest", os.environ | {VARIABLE: "z80"})
    assert done.returncode != 0
    assert "cpu is 'z80', which this machine does not have: choose " in done.stderr and "generic" in done.stderr


def run_python(program: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def variables_of_make(cpu: str) -> Mapping[str, str]:
    """What ``make test CPU=...`` puts before pytest."""
    tool = shutil.which("make")
    assert tool is not None
    command = [tool, "-n", "test", f"CPU={cpu}", "PYTHON=python3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line.split("/pytest")[0] for line in done.stdout.splitlines() if "/pytest " in line)
    return dict(word.split("=", 1) for word in line.split()[:-1])
