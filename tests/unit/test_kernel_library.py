"""The library of C kernels: how it is built, named, found and refused, and what a user is told."""

from __future__ import annotations

import logging
import os
import platform
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_kernels import build, library
from cpu_kernels.build import BuildFailed, Platform, built_library, find_compiler, sources_digest, this_machine
from cpu_kernels.library import Library, LibraryRefused
from cpu_kernels.tiers import LOWER

MINIMAL = """
#include "tier.h"
#include "kernel.h"
void TIERED(nothing)(const void *record, const struct team *team) { (void)record; (void)team; }
#include "tier_end.h"
"""
TABLE = """
#include "kernel.h"
extern kernel_code nothing_generic;
#define EXPORTED __attribute__((visibility("default")))
EXPORTED const struct kernel quickchange_kernels[] = {{"nothing", "int64_t|size;", SIZE, {nothing_generic}}, {0}};
EXPORTED const char quickchange_tier_names[] = "generic avx2 avxvnni avx512vnni amx dotprod i8mm";
EXPORTED const char quickchange_compiler[] = __VERSION__;
"""


@pytest.fixture
def whole() -> Path:
    """The library of this checkout."""
    found = library.library()
    assert found is not None
    return found.path


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one kernel for one tier, whose folder for libraries is empty."""
    folder = tmp_path / "package" / "csrc"
    folder.mkdir(parents=True)
    for name in ("tier.h", "tier_end.h", "kernel.h"):
        (folder / name).write_bytes((build.SOURCES / name).read_bytes())
    (folder / "nothing.c").write_text(MINIMAL)
    (folder / "kernels.c").write_text(TABLE.replace("SIZE", "8"))
    (folder / "tier.h").write_text((folder / "tier.h").read_text().replace("#include <immintrin.h>", ""))
    generic = {"x86_64": ("generic",), "aarch64": ("generic",)}
    monkeypatch.setattr(build, "VECTOR_TIERS", generic)
    monkeypatch.setattr(build, "_TIERS", generic)
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "LIBRARIES", folder.parent / "lib")
    monkeypatch.setattr(library, "LIBRARIES", folder.parent / "lib")
    monkeypatch.setattr(build.sources_digest, "__defaults__", (folder,))
    monkeypatch.setattr(build.built_library, "__defaults__", (folder.parent / "lib", None))
    monkeypatch.setattr(build.build, "__defaults__", (folder.parent / "lib",))
    return folder


@pytest.fixture
def _loaded_anew() -> Iterator[None]:
    library._library.cache_clear()
    yield
    library._library.cache_clear()


def test_every_kernel_of_the_table_has_code_for_the_lowest_tier_and_fields_of_eight_bytes(whole: Path) -> None:
    kernels = Library(whole).kernels
    assert {"add", "scale", "rms_norm"} <= kernels.keys()
    for name, entry in kernels.items():
        assert "generic" in entry.code and entry.fields, name
        assert set(entry.code) <= set(LOWER)


def test_a_tier_without_code_of_its_own_has_that_of_the_next_lower(whole: Path) -> None:
    entry = library.KernelEntry([("int64_t", "size")], {"generic": 1, "avx2": 2})
    assert [entry.code_for(tier) for tier in ("amx", "avx2", "i8mm")] == [("avx2", 2), ("avx2", 2), ("generic", 1)]


def test_a_library_is_found_by_the_digest_of_its_sources_and_replaced_when_they_change(sources: Path) -> None:
    assert built_library() is None
    first = build.build()
    assert built_library() == first and f"-{sources_digest()}-" in first.name
    (sources / "nothing.c").write_text(MINIMAL + "\n/* changed */\n")
    assert built_library() is None
    second = build.build()
    assert built_library() == second != first and not first.exists()
    assert [path.name for path in second.parent.iterdir()] == [second.name]
    assert stat.S_IMODE(second.stat().st_mode) & 0o444 == 0o444


def test_a_library_that_was_written_in_part_is_not_found(sources: Path) -> None:
    path = build.build()
    path.write_bytes(path.read_bytes()[:-1])
    assert built_library() is None
    build.build()
    assert built_library() is not None


@pytest.mark.usefixtures("_loaded_anew")
def test_a_checkout_builds_its_library_when_it_is_first_needed(sources: Path) -> None:
    found = library.library()
    assert found is not None and found.path.parent == sources.parent / "lib"
    assert list(found.kernels) == ["nothing"] and found.compiler
    assert library.library() is found


@pytest.mark.usefixtures("_loaded_anew")
def test_a_library_with_another_table_is_refused_with_a_warning(
    sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sources / "kernels.c").write_text(TABLE.replace("SIZE", "16"))
    with pytest.raises(LibraryRefused, match="the entry of 'nothing' is damaged"):
        Library(build.build())
    (sources / "kernels.c").write_text(TABLE.replace("SIZE", "8").replace("quickchange_compiler", "other"))
    with pytest.raises(LibraryRefused, match="has no 'quickchange_compiler'"):
        Library(build.build())
    (sources / "kernels.c").write_text(TABLE.replace("SIZE", "8").replace("avxvnni", "avx10"))
    assert library.library() is None and library.library() is None
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelno == logging.WARNING and "PyTorch's slower operations" in record.getMessage()
    assert "avx10" in record.getMessage()


@pytest.mark.usefixtures("_loaded_anew")
def test_a_source_that_does_not_compile_is_one_warning_with_the_compilers_words(
    sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sources / "nothing.c").write_text('#include "tier.h"\nint broken(;\n#include "tier_end.h"\n')
    assert library.library() is None and library.library() is None
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "nothing.c for " in record.getMessage() and "error:" in record.getMessage()


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(sources: Path) -> None:
    (sources.parent / "lib").write_text("a file, which root cannot make a folder either")
    with pytest.raises(BuildFailed, match=r"lib.* cannot be written .*: run 'python -m cpu_kernels.build' as a user"):
        build.build()
    with pytest.raises(BuildFailed, match=r"no library of these sources .* or install the package again"):
        library._built_now()


def test_without_a_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = this_machine()
    assert target is not None
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildFailed, match=r"there is no C compiler: install gcc 11 .*'pip install ziglang=="):
        find_compiler(target)
    old = tmp_path / "cc"
    old.write_text("#!/bin/sh\necho 'unknown target avxvnni' >&2\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(BuildFailed, match=r"'cc' does not build every instruction set \(unknown target avxvnni\)"):
        find_compiler(target)
    monkeypatch.setattr(build, "find_spec", lambda name: object())
    assert find_compiler(target)[:3] == [sys.executable, "-m", "ziglang"]
    monkeypatch.setenv("CC", f"{tmp_path}/cc -m64")
    assert build.system_compilers(target) == [[f"{tmp_path}/cc", "-m64"]]
    assert build.system_compilers(Platform("aarch64", "macos")) == []


def test_machines_without_kernels_have_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for machine, system, expected in (
            ("AMD64", "linux", Platform("x86_64", "linux")),
            ("arm64", "darwin", Platform("aarch64", "macos")),
            ("aarch64", "linux", Platform("aarch64", "linux")),
            ("ppc64le", "linux", None),
            ("AMD64", "win32", None),
        ):
            this_machine.cache_clear()
            monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
            monkeypatch.setattr(sys, "platform", system)
            assert this_machine() == expected
        with pytest.raises(BuildFailed, match="there are no C kernels for AMD64 on win32"):
            build.build()
    finally:
        monkeypatch.undo()
        this_machine.cache_clear()


def test_two_processes_do_not_build_at_once(sources: Path) -> None:
    """The second finds what the first has built."""
    made = []
    with library._exclusive(sources.parent / "lib"):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if library._built_now() == built_library() else 1)
            finally:
                os._exit(2)
        made.append(build.build())
        before = made[0].stat().st_ino
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert made[0].stat().st_ino == before
