"""The cores that this process may use, and the default number of threads: one for each performance core.

Not one for each CPU that the system counts. The hardware threads of a core (SMT) share its arithmetic units and its way
to memory. An efficiency core has half the speed or less, and the other threads wait for it. Both are left to the
server's other work: HTTP, tokenizers, the operating system.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cpu_kernels.cpu_quota import cpu_quota

PERFORMANCE_SHARE = 0.75
"""A CPU belongs to a performance core if it has at least this share of the largest capacity or frequency there is.

Middle cores of ARM's have 0.85 and more, small ones at most 0.5. Favored cores differ by less than 0.1 in frequency,
AMD's compact cores by 0.3.
"""


@dataclass(frozen=True)
class Cores:
    """The CPUs of an affinity, the cores that they belong to, the performance cores of these, and the quota in CPUs."""

    num_cpus: int
    num_cores: int
    num_performance_cores: int
    quota: float | None = None

    @property
    def default_threads(self) -> int:
        whole = self.num_performance_cores if self.quota is None else int(self.quota)
        return max(1, min(self.num_performance_cores, whole))

    def __str__(self) -> str:
        if self.num_performance_cores < self.num_cores:
            cores = f"{self.num_performance_cores} performance cores of {self.num_cores}"
        else:
            cores = f"{self.num_cores} cores" if self.num_cores > 1 else "1 core"
        cpus = f" ({self.num_cpus} CPUs)" if self.num_cpus != self.num_cores else ""
        quota = "no CPU quota" if self.quota is None else f"a quota of {self.quota:.4g} CPUs"
        return f"{cores}{cpus}, {quota}"


def default_threads() -> int:
    return find_cores().default_threads


def find_cores(root: Path = Path("/")) -> Cores:
    """The cores of this process by its affinity. ``root`` holds Linux's ``proc`` and ``sys``."""
    if platform.system() == "Darwin":
        return _cores_of_macos()
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    folder = root / "sys/devices"
    performance = _performance_cpus(folder, cpus) or cpus
    return Cores(len(cpus), _num_cores(folder, cpus), _num_cores(folder, performance), cpu_quota(root))


def _performance_cpus(folder: Path, cpus: Iterable[int]) -> set[int]:
    """The CPUs of performance cores: by Intel's list, by ARM's capacities, or by their maximum frequencies."""
    listed = _read(folder / "cpu_core/cpus")
    if listed:
        return _cpu_list(listed) & set(cpus)
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        speeds = {cpu: _read(folder / f"system/cpu/cpu{cpu}" / name) for cpu in cpus}
        if all(speed.isdecimal() for speed in speeds.values()):
            fast = PERFORMANCE_SHARE * max(map(int, speeds.values()))
            return {cpu for cpu, speed in speeds.items() if int(speed) >= fast}
    return set()


def _num_cores(folder: Path, cpus: Iterable[int]) -> int:
    """The number of cores that have these CPUs as their hardware threads."""
    return len({_siblings(folder / f"system/cpu/cpu{cpu}/topology") or str(cpu) for cpu in cpus})


def _siblings(topology: Path) -> str:
    """The CPUs of a core as Linux lists them; by its older name before 5.10, and empty where there is none."""
    return _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")


def _cpu_list(text: str) -> set[int]:
    """The CPUs of a list as ``0-3,8``."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cores_of_macos() -> Cores:
    """macOS has neither affinity nor quotas. ``perflevel0`` are the performance cores, where a Mac has classes."""
    num_cpus = os.cpu_count() or 1
    num_cores = _sysctl("hw.physicalcpu") or num_cpus
    return Cores(num_cpus, num_cores, _sysctl("hw.perflevel0.physicalcpu") or num_cores)


def _sysctl(name: str) -> int | None:
    """An integer of macOS's table of the machine; None where it has none of this name."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    failed = ctypes.CDLL(None).sysctlbyname(
        name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return None if failed else value.value
