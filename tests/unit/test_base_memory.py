"""How much memory is left for a base: what the system has, or what a container's limit leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from base_files.errors import BaseTooLarge
from base_files.memory import available_bytes

MEBIBYTE = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 100 MiB available and no control groups."""
    write(tmp_path / "proc/meminfo", "MemTotal: 409600 kB\nMemAvailable: 102400 kB\nBuffers: 1 kB\n")
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def limit(folder: Path, most: object, used: int, droppable: int) -> None:
    write(folder / "memory.max", most)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", f"anon {used}\ninactive_file {droppable}")


def test_without_limits_it_is_what_the_system_has_available(root: Path) -> None:
    assert available_bytes(root) == 100 * MEBIBYTE


def test_the_limit_of_a_container_counts_less_what_is_used_and_cannot_be_dropped(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/")
    limit(root / "sys/fs/cgroup", 50 * MEBIBYTE, 30 * MEBIBYTE, 10 * MEBIBYTE)
    assert available_bytes(root) == 30 * MEBIBYTE


def test_the_limit_of_a_group_around_the_own_one_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/service/worker")
    limit(root / "sys/fs/cgroup/service", 20 * MEBIBYTE, 5 * MEBIBYTE, 0)
    limit(root / "sys/fs/cgroup/service/worker", "max", 4 * MEBIBYTE, 0)
    assert available_bytes(root) == 15 * MEBIBYTE


def test_a_group_that_is_full_leaves_nothing(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/")
    limit(root / "sys/fs/cgroup", 10 * MEBIBYTE, 11 * MEBIBYTE, 0)
    assert available_bytes(root) == 0


def test_pages_of_files_that_were_read_twice_can_be_dropped_too(root: Path) -> None:
    """A server that is started again has read its base before: its pages are active, and the base was refused."""
    write(root / "proc/self/cgroup", "0::/")
    limit(root / "sys/fs/cgroup", 50 * MEBIBYTE, 45 * MEBIBYTE, 5 * MEBIBYTE)
    write(root / "sys/fs/cgroup/memory.stat", f"inactive_file {5 * MEBIBYTE}\nactive_file {30 * MEBIBYTE}")
    assert available_bytes(root) == 40 * MEBIBYTE


def test_groups_of_version_1_have_other_names(root: Path) -> None:
    write(root / "proc/self/cgroup", "3:cpu,cpuacct:/\n4:memory:/docker/1f\n0::/")
    folder = root / "sys/fs/cgroup/memory/docker/1f"
    write(folder / "memory.limit_in_bytes", 40 * MEBIBYTE)
    write(folder / "memory.usage_in_bytes", 10 * MEBIBYTE)
    write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {2 * MEBIBYTE}")
    assert available_bytes(root) == 32 * MEBIBYTE


def test_a_system_that_does_not_say_counts_as_its_whole_memory(tmp_path: Path) -> None:
    available = available_bytes(tmp_path)
    assert available is not None and available > 100 * MEBIBYTE


def test_a_refusal_has_both_numbers_and_what_to_do() -> None:
    error = BaseTooLarge("big", needed=12_345_678, available=1_234_567, ways_out="Choose a smaller base.")
    assert str(error) == (
        "base model 'big' is refused before it is read: its weights take 12,345,678 bytes of memory, and 1,234,567 "
        "bytes are free. Choose a smaller base."
    )
