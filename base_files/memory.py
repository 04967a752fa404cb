"""How much memory the system has left for a base."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def available_bytes(root: Path = _ROOT) -> int | None:
    """Memory that this process can still get without swapping; None where the system does not say.

    On Linux what /proc/meminfo has as available, or less where a control group (a container) has a limit. Elsewhere
    the whole memory of the machine.
    """
    available = _available_by_meminfo(root / "proc/meminfo")
    if available is None:
        return _machine_bytes()
    return min([available, *_left_in_groups(root)])


def _available_by_meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _machine_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group of this process, and each group around it, leaves of its limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _left(root / "sys/fs/cgroup", path, "memory.max", "memory.current", prefix="")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            yield from _left(root / "sys/fs/cgroup/memory", path, *names, prefix="total_")


def _left(mount: Path, path: str, limit: str, usage: str, *, prefix: str) -> Iterator[int]:
    """Of a group and those around it; in a container the mount has the container's own group at its root."""
    folder = mount / path.lstrip("/")
    for group in (folder, *folder.parents):
        try:
            text = (group / limit).read_text(encoding="utf-8").strip()
            if text != "max":
                used = int((group / usage).read_text(encoding="utf-8")) - _file_pages(group, prefix)
                yield max(0, int(text) - used)
        except (OSError, ValueError):
            pass
        if group == mount:
            return


def _file_pages(group: Path, prefix: str) -> int:
    """Pages of files, which count as usage and can be dropped. Those of a file that was read twice are active ones."""
    lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in names)
