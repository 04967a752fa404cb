"""How much CPU time Linux lets this process use: the quotas of its control groups.

A container has a quota by ``docker run --cpus``, a systemd unit by ``CPUQuota=``, which may stand on a slice above it.
So every group from the process's own to the root of the mount counts, and the smallest quota is the one that holds.
Sources: Linux's ``Documentation/admin-guide/cgroup-v2.rst`` (``cpu.max``), ``Documentation/scheduler/sched-bwc.rst``
(``cpu.cfs_quota_us`` of version 1), and ``proc(5)`` (``mountinfo``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy of control groups is mounted. ``top`` is the group whose folder ``point`` is."""

    is_version_2: bool
    top: PurePosixPath
    point: PurePosixPath


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPUs' worth of time that this process may use, as 1.5; None without a limit.

    ``root`` holds ``proc`` and ``sys``.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    own = dict(_own_groups(groups))
    quotas = [
        quota
        for mount in _mounts(mounts)
        if mount.is_version_2 in own
        for folder in _folders(mount, own[mount.is_version_2])
        if (quota := _quota(root / folder.relative_to("/"), mount.is_version_2)) is not None
    ]
    return min(quotas, default=None)


def _own_groups(lines: list[str]) -> Iterator[tuple[bool, PurePosixPath]]:
    """This process's group in version 2 (True), and in the hierarchy of version 1 that limits CPU time (False)."""
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield True, PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            yield False, PurePosixPath(path)


def _mounts(lines: list[str]) -> Iterator[_Mount]:
    for line in lines:
        left, _, right = line.partition(" - ")
        kind, _, options = right.partition(" ")
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(" ")[-1].split(",")):
            top, point = (PurePosixPath(_unescaped(field)) for field in left.split(" ")[3:5])
            yield _Mount(kind == "cgroup2", top, point)


def _folders(mount: _Mount, group: PurePosixPath) -> Iterator[PurePosixPath]:
    """The folders of a group and those above it, as far as they are mounted.

    In a container without a namespace of its own, ``/proc/self/cgroup`` has the path on the host, and the group itself
    is mounted.
    """
    below = group.relative_to(mount.top) if group.is_relative_to(mount.top) else PurePosixPath()
    folder = mount.point / below
    yield folder
    while folder != mount.point:
        folder = folder.parent
        yield folder


def _quota(folder: Path, is_version_2: bool) -> float | None:
    try:
        if is_version_2:
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
        share = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no file in the topmost group, "max" in version 2
    return share if share > 0 else None  # -1 in version 1: no limit


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
