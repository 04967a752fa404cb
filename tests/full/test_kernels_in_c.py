"""Kernels where this machine's CPU cannot run them, or a sanitizer watches: emulated by SIMDe and QEMU, or as they are.

Needs gcc, and Debian's packages ``libsimde-dev``, ``qemu-user`` and ``gcc-aarch64-linux-gnu``: what is missing fails by
name.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cpu_kernels.build import FLAGS, SOURCES, Platform, compilations
from cpu_kernels.native_kernel import Launcher
from cpu_kernels.native_ops import NativeOps
from cpu_kernels.self_test import CASES
from cpu_kernels.tiers import machine_tiers
from cpu_kernels.torch_ops import TorchOps
from tests.full.captured_calls import CapturedCalls

HERE = Path(__file__).parent / "kernels_in_c"
SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
EMULATED = ("-DTIERS_EMULATED", f"-I{HERE / 'simde'}", "-O1")


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"{name} is missing: Debian's package {package} has it"
    return found


def build_driver(folder: Path, compiler: str, machine: str, *flags: str, link: Sequence[str] = ()) -> Path:
    """The driver with all kernels for an architecture."""

    def compile_one(compilation: tuple[Path, str | None]) -> str:
        source, tier = compilation
        made = str(folder / f"{source.stem}.{tier}.o")
        tier_flags = [] if tier is None else [f"-DTIER_{tier}"]
        run([compiler, *FLAGS, *flags, *tier_flags, "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, compilations(Platform(machine, "linux"))))
    driver = folder / "driver"
    run([compiler, *FLAGS, *flags, f"-I{SOURCES}", str(HERE / "driver.c"), *objects, *link, "-o", str(driver)])
    return driver


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("sanitized"), tool("gcc", "gcc"), "x86_64", *SANITIZED)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert Path("/usr/include/simde/x86/avx512.h").exists(), "SIMDe is missing: Debian's package libsimde-dev has it"
    return build_driver(tmp_path_factory.mktemp("simde"), tool("gcc", "gcc"), "x86_64", *EMULATED)


@pytest.fixture(scope="session")
def on_arm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    emulator = tool("qemu-aarch64", "qemu-user")
    compiler = tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")
    folder = tmp_path_factory.mktemp("arm")
    return [emulator, "-cpu", "max", str(build_driver(folder, compiler, "aarch64", link=["-static"]))]


def results_of(command: Sequence[str], operation: str, tier: str, folder: Path) -> Sequence[torch.Tensor]:
    captured = CapturedCalls(tier)
    with captured:
        results = CASES[operation](NativeOps(captured.launcher()))
    assert captured.calls
    captured.calls = [(kernel, 3, values) for kernel, _, values in captured.calls]
    captured.run(command, folder)
    return results


def assert_like_torchs(results: Sequence[torch.Tensor], operation: str) -> None:
    for got, expected in zip(results, CASES[operation](TorchOps()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", CASES)
@pytest.mark.parametrize("tier", [tier for tier in ("generic", "avx2", "avx512vnni") if tier in machine_tiers()])
def test_sanitizers_find_nothing_and_the_bits_are_those_of_the_library(
    sanitized: Path, operation: str, tier: str, tmp_path: Path
) -> None:
    results = results_of([str(sanitized)], operation, tier, tmp_path)
    for got, expected in zip(results, CASES[operation](NativeOps(Launcher(tier))), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("operation", CASES)
@pytest.mark.parametrize("tier", ["avx2", "avxvnni", "avx512vnni"])
def test_instruction_sets_of_other_x86_cpus_give_torchs_numbers_in_emulation(
    emulated: Path, operation: str, tier: str, tmp_path: Path
) -> None:
    assert_like_torchs(results_of([str(emulated)], operation, tier, tmp_path), operation)


@pytest.mark.parametrize("operation", CASES)
@pytest.mark.parametrize("tier", ["generic", "dotprod", "i8mm"])
def test_arm_gives_torchs_numbers_in_emulation(
    on_arm: Sequence[str], operation: str, tier: str, tmp_path: Path
) -> None:
    assert_like_torchs(results_of(on_arm, operation, tier, tmp_path), operation)


def test_the_librarys_own_threads_have_no_race(tmp_path: Path) -> None:
    program = tmp_path / "threads"
    sources = [str(HERE / "threads.c"), str(SOURCES / "threads.c")]
    run([tool("gcc", "gcc"), *FLAGS, "-g", "-O1", "-fsanitize=thread", f"-I{SOURCES}", *sources, "-o", str(program)])
    assert run([str(program)]) == "right\n"


def test_the_librarys_own_threads_start_anew_in_a_forked_process(tmp_path: Path) -> None:
    program = tmp_path / "threads"
    sources = [str(HERE / "threads.c"), str(SOURCES / "threads.c")]
    run([tool("gcc", "gcc"), *FLAGS, *SANITIZED, f"-I{SOURCES}", *sources, "-o", str(program)])
    assert run([str(program), "fork"]) == "right\n"
