"""Cores, quotas and the default number of threads, on machines whose ``/sys`` and ``/proc`` are made here."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from cpu_kernels import cores
from cpu_kernels.cores import Cores, default_threads, find_cores

CGROUP_2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
CGROUP_1 = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"


class Machine:
    """The files of a machine in a folder, and the CPUs that a process may use."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._monkeypatch = root, monkeypatch

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def use(self, cpus: Iterable[int]) -> None:
        usable = set(cpus)
        self._monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable, raising=False)

    def add_cores(self, *siblings: str, capacity: int | None = None, max_khz: int | None = None) -> None:
        """Cores by the lists of their CPUs, as ``0-1`` or ``0,8``."""
        for cpus in siblings:
            for cpu in cores._cpu_list(cpus):
                folder = f"sys/devices/system/cpu/cpu{cpu}"
                self.write(f"{folder}/topology/core_cpus_list", cpus)
                if capacity is not None:
                    self.write(f"{folder}/cpu_capacity", str(capacity))
                if max_khz is not None:
                    self.write(f"{folder}/cpufreq/cpuinfo_max_freq", str(max_khz))

    def add_groups(self, own: str, mount: str, files: Mapping[str, str]) -> None:
        self.write("proc/self/cgroup", own)
        self.write("proc/self/mountinfo", f"23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n{mount}")
        for path, text in files.items():
            self.write(path, text)

    @property
    def cores(self) -> Cores:
        return find_cores(self.root)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def server(machine: Machine) -> Machine:
    """Eight cores of one kind with two hardware threads each, as AMD's and Intel's servers count them."""
    machine.add_cores(*(f"{core},{core + 8}" for core in range(8)), max_khz=3_700_000)
    machine.use(range(16))
    return machine


@pytest.fixture
def hybrid(machine: Machine) -> Machine:
    """Intel's with eight performance cores of two hardware threads, and eight efficiency cores."""
    machine.add_cores(*(f"{2 * core}-{2 * core + 1}" for core in range(8)), max_khz=5_200_000)
    machine.add_cores(*map(str, range(16, 24)), max_khz=3_900_000)
    machine.write("sys/devices/cpu_core/cpus", "0-15")
    machine.write("sys/devices/cpu_atom/cpus", "16-23")
    machine.use(range(24))
    return machine


def test_a_server_gets_a_thread_for_each_core(server: Machine) -> None:
    assert server.cores == Cores(num_cpus=16, num_cores=8, num_performance_cores=8)
    assert server.cores.default_threads == 8


def test_hybrid_cpus_get_a_thread_for_each_performance_core(hybrid: Machine) -> None:
    assert hybrid.cores == Cores(num_cpus=24, num_cores=16, num_performance_cores=8)
    assert hybrid.cores.default_threads == 8


def test_performance_cores_that_are_not_in_the_affinity_do_not_count(hybrid: Machine) -> None:
    hybrid.use([0, 1, 2, 17, 18])
    assert hybrid.cores == Cores(num_cpus=5, num_cores=4, num_performance_cores=2)


def test_a_process_on_efficiency_cores_alone_gets_all_of_them(hybrid: Machine) -> None:
    hybrid.use(range(16, 22))
    assert hybrid.cores == Cores(num_cpus=6, num_cores=6, num_performance_cores=6)


@pytest.mark.parametrize(
    ("capacities", "expected"),
    [
        pytest.param([485] * 4 + [1024] * 2, 2, id="rk3399"),
        pytest.param([250] * 4 + [871] * 3 + [1024], 4, id="three_kinds"),
        pytest.param([1024] * 4, 4, id="raspberry_pi_5"),
    ],
)
def test_big_and_little_cores_are_told_apart_by_their_capacities(
    machine: Machine, capacities: list[int], expected: int
) -> None:
    for cpu, capacity in enumerate(capacities):
        machine.add_cores(str(cpu), capacity=capacity, max_khz=1_800_000)
    machine.use(range(len(capacities)))
    assert machine.cores == Cores(len(capacities), len(capacities), expected)


@pytest.mark.parametrize(
    ("mhz", "expected"),
    [
        pytest.param([5100] * 4 + [3300] * 8, 4, id="compact_cores"),
        pytest.param([5200] * 2 + [4900] * 6, 8, id="favored_cores"),
    ],
)
def test_without_capacities_cores_are_told_apart_by_their_frequencies(
    machine: Machine, mhz: list[int], expected: int
) -> None:
    for core, frequency in enumerate(mhz):
        machine.add_cores(f"{core},{core + len(mhz)}", max_khz=1000 * frequency)
    machine.use(range(2 * len(mhz)))
    assert machine.cores == Cores(2 * len(mhz), len(mhz), expected)


def test_a_system_that_tells_nothing_of_its_cpus_has_a_core_for_each(machine: Machine) -> None:
    machine.use(range(3))
    assert machine.cores == Cores(num_cpus=3, num_cores=3, num_performance_cores=3)


def test_linux_before_5_10_lists_siblings_under_another_name(machine: Machine) -> None:
    for cpu in range(4):
        machine.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 2},{cpu % 2 + 2}")
    machine.use(range(4))
    assert machine.cores.num_cores == 2


def test_a_cpuset_of_one_core_gets_one_thread(server: Machine) -> None:
    server.use([3])
    assert server.cores == Cores(num_cpus=1, num_cores=1, num_performance_cores=1)
    server.use([3, 11])  # its two hardware threads
    assert server.cores == Cores(num_cpus=2, num_cores=1, num_performance_cores=1)
    assert server.cores.default_threads == 1


QUOTAS = {
    "docker run --cpus 1.5": ("0::/", CGROUP_2, {"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5, 1),
    "docker run --cpus 0.5": ("0::/", CGROUP_2, {"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1),
    "docker run --cpus 2.9": ("0::/", CGROUP_2, {"sys/fs/cgroup/cpu.max": "290000 100000"}, 2.9, 2),
    "docker run --cpus 64": ("0::/", CGROUP_2, {"sys/fs/cgroup/cpu.max": "6400000 100000"}, 64.0, 8),
    "no quota": ("0::/", CGROUP_2, {"sys/fs/cgroup/cpu.max": "max 100000"}, None, 8),
    "a unit with CPUQuota=": (
        "0::/system.slice/quickchange.service",
        CGROUP_2,
        {
            "sys/fs/cgroup/system.slice/cpu.max": "max 100000",
            "sys/fs/cgroup/system.slice/quickchange.service/cpu.max": "350000 100000",
        },
        3.5,
        3,
    ),
    "CPUQuota= of its slice, of a slice within": (
        "0::/models.slice/models-small.slice/quickchange.service",
        CGROUP_2,
        {
            "sys/fs/cgroup/models.slice/cpu.max": "500000 100000",
            "sys/fs/cgroup/models.slice/models-small.slice/cpu.max": "40000 20000",
            "sys/fs/cgroup/models.slice/models-small.slice/quickchange.service/cpu.max": "400000 100000",
        },
        2.0,
        2,
    ),
    "the host's path in a container without a namespace": (
        "0::/system.slice/docker-12ab.scope",
        "30 24 0:26 /system.slice/docker-12ab.scope /sys/fs/cgroup ro - cgroup2 cgroup rw",
        {"sys/fs/cgroup/cpu.max": "200000 100000"},
        2.0,
        2,
    ),
    "a group that is not below what is mounted": (
        "0::/../../elsewhere",
        "30 24 0:26 /docker/12ab /sys/fs/cgroup ro - cgroup2 cgroup rw",
        {"sys/fs/cgroup/cpu.max": "200000 100000"},
        2.0,
        2,
    ),
    "version 1": (
        "4:cpu,cpuacct:/docker/12ab\n3:cpuset:/docker/12ab",
        CGROUP_1,
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/docker/12ab/cpu.cfs_quota_us": "450000",
            "sys/fs/cgroup/cpu,cpuacct/docker/12ab/cpu.cfs_period_us": "100000",
        },
        4.5,
        4,
    ),
    "version 1 in a container": (
        "4:cpu,cpuacct:/docker/12ab",
        CGROUP_1.replace(" / /sys", " /docker/12ab /sys"),
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        1.5,
        1,
    ),
    "both versions, version 1 with the quota": (
        "4:cpu,cpuacct:/models\n0::/models",
        f"{CGROUP_2.replace('/sys/fs/cgroup ', '/sys/fs/cgroup/unified ')}\n{CGROUP_1}",
        {
            "sys/fs/cgroup/unified/models/cgroup.procs": "1",
            "sys/fs/cgroup/cpu,cpuacct/models/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu,cpuacct/models/cpu.cfs_period_us": "100000",
        },
        3.0,
        3,
    ),
    "a mount point with a space": (
        "0::/",
        r"30 24 0:26 / /sys/fs/control\040groups rw - cgroup2 cgroup2 rw",
        {"sys/fs/control groups/cpu.max": "500000 100000"},
        5.0,
        5,
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_threads_fit_the_smallest_quota_above_the_process_rounded_down(server: Machine, case: str) -> None:
    own, mount, files, quota, threads = QUOTAS[case]
    server.add_groups(own, mount, files)
    assert server.cores.quota == quota
    assert server.cores.default_threads == threads


@pytest.mark.parametrize("text", ["", "max", "0 100000", "100000 0", "many 100000"])
def test_a_quota_that_cannot_be_read_is_none(server: Machine, text: str) -> None:
    server.add_groups("0::/", CGROUP_2, {"sys/fs/cgroup/cpu.max": text})
    assert server.cores.quota is None


def test_macos_counts_its_performance_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"hw.physicalcpu": 10, "hw.perflevel0.physicalcpu": 6}
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setattr(cores, "_sysctl", table.get)
    assert find_cores() == Cores(num_cpus=10, num_cores=10, num_performance_cores=6)
    del table["hw.perflevel0.physicalcpu"]  # Intel's Macs
    table["hw.physicalcpu"] = 5
    assert find_cores() == Cores(num_cpus=10, num_cores=5, num_performance_cores=5)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Cores(1, 1, 1), "1 core, no CPU quota"),
        (Cores(16, 8, 8, 1.5), "8 cores (16 CPUs), a quota of 1.5 CPUs"),
        (Cores(24, 16, 8), "8 performance cores of 16 (24 CPUs), no CPU quota"),
    ],
)
def test_the_log_line_has_cores_cpus_and_quota(found: Cores, text: str) -> None:
    assert str(found) == text


def test_this_machine_has_a_thread_for_each_core_or_fewer() -> None:
    found = find_cores()
    assert 1 <= default_threads() <= found.num_performance_cores <= found.num_cores <= found.num_cpus
