"""Builds the library of C kernels from ``csrc/``, with the system's C compiler or the one in the package ``ziglang``.

It imports nothing beyond Python's own modules, because the build hook (``hatch_build.py``) runs it before anything is
installed. A library's name has a digest of all that it was built from and a digest of its own bytes: one of other
sources, and one that was written in part, is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARIES = Path(__file__).parent / "lib"
ZIGLANG = "ziglang==0.17.1"
"""The compiler where the system has none that builds every tier."""
FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-pthread", "-Wall", "-Wextra", "-Wno-psabi",
)  # fmt: skip
"""The same for every compiler. The instruction set of a function is its tier's (``tier.h``), never a flag's."""
VECTOR_TIERS = {"x86_64": ("generic", "avx2", "avx512vnni"), "aarch64": ("generic",)}
"""The tiers for which a source that is not named for one is compiled, by the architecture."""
PRODUCT_TIERS = {"x86_64": ("avxvnni", "amx"), "aarch64": ("dotprod", "i8mm")}
"""Further tiers, which only products have."""
_TIERS = {machine: VECTOR_TIERS[machine] + PRODUCT_TIERS[machine] for machine in VECTOR_TIERS}
_NAMES_OF_TIERS = {tier for tiers in _TIERS.values() for tier in tiers}
_PROBE = """
#include "tier.h"
typedef int numbers __attribute__((vector_size(64)));
numbers probe(numbers x) { return x + 1; }
#include "tier_end.h"
"""
_MACOS = "11.0"
"""The oldest macOS that a library runs on: the first for ARM."""
_GLIBC = "2.17"
"""The oldest glibc that a library of ziglang's runs on: that of the tag manylinux2014."""


class BuildFailed(Exception):
    """No library can be built here; the message says why, and what to do."""


@dataclass(frozen=True)
class Platform:
    """What a library is built for: ``x86_64`` or ``aarch64``, and ``linux`` or ``macos``."""

    machine: str
    system: str

    @property
    def suffix(self) -> str:
        return ".dylib" if self.system == "macos" else ".so"

    @property
    def tiers(self) -> tuple[str, ...]:
        return _TIERS[self.machine]

    @property
    def name(self) -> str:
        return f"{self.machine}-{self.system}"


@cache
def this_machine() -> Platform | None:
    """The target that this Python runs on; None where there are no kernels for it."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    system = {"linux": "linux", "darwin": "macos"}.get(sys.platform)
    is_64_bit = sys.maxsize > 2**32
    return Platform(machine, system) if system and machine in VECTOR_TIERS and is_64_bit else None


def sources_digest(sources: Path = SOURCES) -> str:
    """12 hex digits for all that a library is built from: the sources, and this file with the flags."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(sources.glob("*.[ch]")):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def built_library(folder: Path = LIBRARIES, target: Platform | None = None) -> Path | None:
    """The library that was built from these sources for this target, whole; None where there is none."""
    target = target or this_machine()
    if target is None or not SOURCES.is_dir():
        return None
    candidates = sorted(folder.glob(f"kernels-{target.name}-{sources_digest()}-*{target.suffix}"))
    return next((path for path in candidates if path.stem.endswith(f"-{_content_digest(path)}")), None)


def build(folder: Path = LIBRARIES, *, target: Platform | None = None, compiler: Sequence[str] | None = None) -> Path:
    """Build the library into ``folder`` and remove those of other sources there. Raises ``BuildFailed``."""
    target = target or this_machine()
    if target is None:
        raise BuildFailed(f"there are no C kernels for {platform.machine()} on {sys.platform}")
    if not SOURCES.is_dir():
        raise BuildFailed(f"the sources are missing ({SOURCES}): install the package again")
    with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
        made = _compile(compiler or find_compiler(target), Path(scratch), target)
        path = folder / f"kernels-{target.name}-{sources_digest()}-{_content_digest(made)}{target.suffix}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / f".{path.name}.{os.getpid()}"
            shutil.copy(made, unfinished)
            os.replace(unfinished, path)
            for other in folder.glob(f"kernels-{target.name}-*"):
                if other != path:
                    other.unlink(missing_ok=True)
        except OSError as error:
            raise BuildFailed(f"{folder} cannot be written ({error}): {_BUILD_AS_OWNER}") from error
    return path


_BUILD_AS_OWNER = "run 'python -m cpu_kernels.build' as a user who may write there"


def find_compiler(target: Platform) -> Sequence[str]:
    """``CC``, the system's ``cc``, or ziglang's. Raises ``BuildFailed`` with what is wrong with each."""
    problems = []
    for command in system_compilers(target):
        problem = probe(command, target)
        if problem is None:
            return command
        problems.append(f"'{shlex.join(command)}' does not build every instruction set ({problem.splitlines()[0]})")
    if find_spec("ziglang") is not None:
        return zig_command(target)
    reason = "; ".join(problems) or "there is no C compiler"
    raise BuildFailed(f"{reason}: install gcc 11 or later, clang 12 or later, or 'pip install {ZIGLANG}'")


def system_compilers(target: Platform) -> Sequence[Sequence[str]]:
    """The commands of the C compilers that this system has for a target, which may lack instruction sets."""
    if target != this_machine():
        return []
    if os.environ.get("CC"):
        return [shlex.split(os.environ["CC"])]
    return [["cc"]] if shutil.which("cc") else []


def zig_command(target: Platform) -> list[str]:
    """The compiler of the package ziglang, for the baseline of an architecture and the oldest systems."""
    system = f"linux-gnu.{_GLIBC}" if target.system == "linux" else f"macos.{_MACOS}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{target.machine}-{system}", "-mcpu=baseline"]


def probe(command: Sequence[str], target: Platform) -> str | None:
    """What a compiler says that does not compile and link every tier; None where it does."""
    with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
        source = Path(scratch, "probe.c")
        source.write_text(_PROBE, encoding="utf-8")
        objects = [Path(scratch, f"{tier}.o") for tier in target.tiers]
        for tier, made in zip(target.tiers, objects, strict=True):
            arguments: list[str | Path] = [*FLAGS]
            arguments += [f"-Dprobe=probe_{tier}", f"-DTIER_{tier}", f"-I{SOURCES}", "-c", source, "-o", made]
            problem = _run(command, arguments, scratch)
            if problem is not None:
                return problem
        arguments = [*_link_flags(target), *objects, "-o", Path(scratch, "probe.so")]
        return _run(command, arguments, scratch)


def _content_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def compilations(target: Platform) -> Iterator[tuple[Path, str | None]]:
    """Each source and the tier that it is compiled for; None for code that is the same on every tier."""
    for source in sorted(SOURCES.glob("*.c")):
        named = re.search(r"_([a-z0-9]+)\Z", source.stem)
        if '#include "tier.h"' not in source.read_text(encoding="utf-8"):
            yield source, None
        elif named is None or named[1] not in _NAMES_OF_TIERS:
            yield from ((source, tier) for tier in VECTOR_TIERS[target.machine])
        elif named[1] in target.tiers:
            yield source, named[1]


def _link_flags(target: Platform) -> Sequence[str]:
    """A library that lacks no symbol: the linkers of macOS say so by themselves."""
    return ["-shared", "-pthread", *(["-Wl,-z,defs"] if target.system == "linux" else [])]


def _compile(command: Sequence[str], scratch: Path, target: Platform) -> Path:
    def compile_one(compilation: tuple[Path, str | None]) -> Path:
        source, tier = compilation
        made = scratch / f"{source.stem}.{tier or 'plain'}.o"
        tier_flags = [] if tier is None else [f"-DTIER_{tier}"]
        problem = _run(command, [*FLAGS, *tier_flags, "-c", source, "-o", made], str(scratch))
        if problem is not None:
            raise BuildFailed(f"{source.name} for {tier or 'every tier'}: {problem}")
        return made

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, compilations(target)))
    library = scratch / f"library{target.suffix}"
    problem = _run(command, [*_link_flags(target), *objects, "-o", library], str(scratch))
    if problem is not None:
        raise BuildFailed(f"linking: {problem}")
    return library


def _run(command: Sequence[str], arguments: Sequence[str | Path], scratch: str) -> str | None:
    """Run a compiler with its caches in ``scratch``; what it says where it fails."""
    own = {"ZIG_GLOBAL_CACHE_DIR": scratch, "ZIG_LOCAL_CACHE_DIR": scratch, "MACOSX_DEPLOYMENT_TARGET": _MACOS}
    try:
        done = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, env=os.environ | own, check=False
        )
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()[-2000:] or f"exit status {done.returncode}"


if __name__ == "__main__":
    try:
        print(built_library() or build())
    except BuildFailed as failed:
        sys.exit(f"the C kernels cannot be built: {failed}")
