"""The blocks of ``blocks.h``, drawn by teams of threads of a small C program."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_kernels.build import FLAGS, SOURCES, find_compiler, this_machine

PROGRAM = Path(__file__).parents[1] / "csrc" / "blocks.c"
COUNTS = (0, 1, 2, 3, 5, 16, 31, 97, 304, 4748)
LOOPS = 300

Draw = Callable[[int], list[list[int]]]


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """By the number of threads: for each of ``COUNTS`` it, fewest and most drawings of a block, tickets, runs."""
    target = this_machine()
    assert target is not None, "there are no C kernels for this machine"
    compiler = find_compiler(target)
    folder = tmp_path_factory.mktemp("blocks")
    command = [*compiler, *FLAGS, f"-I{SOURCES}", str(PROGRAM), "-o", str(folder / "blocks")]
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
    subprocess.run(command, check=True, env=os.environ | caches)

    def run(threads: int) -> list[list[int]]:
        arguments = [str(number) for number in (threads, LOOPS, *COUNTS)]
        done = subprocess.run([folder / "blocks", *arguments], check=True, capture_output=True, text=True, timeout=60)
        return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_block_is_drawn_once_in_each_of_many_loops(draw: Draw, threads: int) -> None:
    results = draw(threads)
    drawn = [(count, fewest, most) for count, fewest, most, _, _ in results]
    assert drawn == [(count, LOOPS, LOOPS) for count in COUNTS]
    assert [tickets for _, _, _, tickets, _ in results] == [0] * len(COUNTS)


def test_many_blocks_are_drawn_in_few_runs_and_few_blocks_by_all_threads(draw: Draw) -> None:
    runs = {threads: {count: num_runs for count, _, _, _, num_runs in draw(threads)} for threads in (1, 2, 8)}
    assert runs[1] == {count: min(count, 1) for count in COUNTS}
    assert runs[2] == {0: 0, 1: 1, 2: 2, 3: 3, 5: 5, 16: 8, 31: 11, 97: 15, 304: 18, 4748: 26}
    assert [runs[8][count] for count in (5, 16, 4748)] == [5, 16, 92]
