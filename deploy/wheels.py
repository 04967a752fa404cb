"""Builds the wheels of every platform on this one, and checks the libraries in them: ``make wheels``.

ziglang's compiler builds for all of them. A Linux library must ask for symbols of glibc 2.17 at most, as its wheel's
tag says, and a library for macOS on ARM must be signed, ad hoc at least, or the system does not load it.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGETS = ("x86_64-linux", "aarch64-linux", "aarch64-macos")
NEWEST_GLIBC = (2, 17)
_DYNAMIC_STRINGS, _VERSIONS_NEEDED = 3, 0x6FFFFFFE
_MACHINES = {"x86_64": 62, "aarch64": 183}
"""``e_machine`` of an ELF file."""
_MACHO_64, _ARM64 = 0xFEEDFACF, 0x0100000C
_CODE_SIGNATURE, _EMBEDDED_SIGNATURE, _CODE_DIRECTORY = 0x1D, 0xFADE0CC0, 0xFADE0C02


def problems_of(library: bytes, target: str) -> Sequence[str]:
    """What is wrong with the library of a wheel for a target; nothing where it is right."""
    machine, system = target.split("-")
    if system == "macos":
        return [] if is_signed(library) else ["it is not a signed library for ARM"]
    if library[:4] != b"\x7fELF" or struct.unpack_from("<H", library, 18)[0] != _MACHINES[machine]:
        return [f"it is not an ELF library for {machine}"]
    return [
        f"it needs {name}, and glibc {'.'.join(map(str, NEWEST_GLIBC))} is the newest allowed"
        for name in needed_versions(library)
        if not name.startswith("GLIBC_") or tuple(map(int, name[6:].split("."))) > NEWEST_GLIBC
    ]


def needed_versions(library: bytes) -> Iterator[str]:
    """The versions of other libraries' symbols that a 64-bit ELF library asks for, such as ``GLIBC_2.17``."""
    (sections_at,) = struct.unpack_from("<Q", library, 40)
    section_size, num_sections = struct.unpack_from("<HH", library, 58)
    sections = [struct.unpack_from("<IIQQQQII", library, sections_at + section_size * i) for i in range(num_sections)]
    for _, kind, _, _, offset, _, link, count in sections:
        if kind != _VERSIONS_NEEDED:
            continue
        names_at = sections[link][4]
        for _ in range(count):
            _, num_versions, _, first, following = struct.unpack_from("<HHIII", library, offset)
            at = offset + first
            for _ in range(num_versions):
                _, _, _, name, after = struct.unpack_from("<IHHII", library, at)
                yield library[names_at + name : library.index(b"\0", names_at + name)].decode()
                at += after
            offset += following


def is_signed(library: bytes) -> bool:
    """Whether this is a Mach-O library for ARM with a code signature that covers it."""
    magic, cpu, _, _, num_commands = struct.unpack_from("<5I", library)
    if (magic, cpu) != (_MACHO_64, _ARM64):
        return False
    at = 32
    for _ in range(num_commands):
        command, size = struct.unpack_from("<2I", library, at)
        if command == _CODE_SIGNATURE:
            place, length = struct.unpack_from("<2I", library, at + 8)
            blob, _, _, _, directory = struct.unpack_from(">5I", library, place)
            kind = struct.unpack_from(">I", library, place + directory)[0]
            covered = struct.unpack_from(">I", library, place + directory + 32)[0]
            return (blob, kind, covered) == (_EMBEDDED_SIGNATURE, _CODE_DIRECTORY, place) and length > 0
        at += size
    return False


def build(target: str, folder: Path) -> Path:
    """The wheel for a target, built into ``folder``. Raises ``subprocess.CalledProcessError``."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    before = set(folder.glob("*.whl"))
    subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"QUICKCHANGE_WHEEL_TARGET": target, "SOURCE_DATE_EPOCH": "1577836800"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def library_of(wheel: Path) -> bytes:
    """The one library of C kernels in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.startswith("cpu_kernels/lib/")]
        return archive.read(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="where the wheels go")
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.glob("quickchange-*.whl"):
        old.unlink()
    failed = False
    for target in options.targets:
        wheel = build(target, options.folder)
        problems = problems_of(library_of(wheel), target)
        failed = failed or bool(problems)
        print(f"{wheel.name}: {'; '.join(problems) or 'checked'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
