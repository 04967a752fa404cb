"""The instruction sets that a machine has, those that a process may use, and what a wrong choice is told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cpu_kernels import tiers
from cpu_kernels.tiers import LOWER, OTHER_LIBRARIES, VARIABLE, TierRefused, available_tiers, use_tier
from server.settings import Settings
from tests.serving import ROOT

AVX2 = "fpu avx2 fma f16c bmi1 bmi2"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"
VNNI = f"{AVX512} avx512_vnni"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    set_by_tiers = {VARIABLE, *(name for table in OTHER_LIBRARIES.values() for name in table)}
    kept = {name: value for name, value in os.environ.items() if name not in set_by_tiers}
    monkeypatch.setattr(os, "environ", kept)
    cached = (tiers.machine_tiers, tiers.offered_tiers, tiers.available_tiers)
    for each in cached:
        each.cache_clear()
    yield
    monkeypatch.undo()
    for each in cached:
        each.cache_clear()


def machine(monkeypatch: pytest.MonkeyPatch, flags: str, name: str = "x86_64", *, may_use_tiles: bool = True) -> None:
    monkeypatch.setattr(platform, "machine", lambda: name)
    monkeypatch.setattr(tiers, "_cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(tiers, "_may_use_tiles", lambda: may_use_tiles)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2", ["generic"]),
        ("fpu avx2", ["generic"]),
        (AVX2, ["avx2", "generic"]),
        (AVX512, ["avx2", "generic"]),
        (f"{AVX2} avx_vnni", ["avxvnni", "avx2", "generic"]),
        (VNNI, ["avx512vnni", "avx2", "generic"]),
        (f"{VNNI} avx_vnni", ["avx512vnni", "avxvnni", "avx2", "generic"]),
        (f"{VNNI} amx_tile amx_int8 amx_bf16", ["amx", "avx512vnni", "avx2", "generic"]),
        (f"{VNNI} amx_tile amx_bf16", ["avx512vnni", "avx2", "generic"]),
    ],
)
def test_an_x86_cpu_has_the_tiers_whose_instructions_it_names(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: Sequence[str]
) -> None:
    machine(monkeypatch, flags)
    assert list(available_tiers()) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fp asimd", ["generic"]),
        ("fp asimd asimddp", ["dotprod", "generic"]),
        ("fp asimd asimddp i8mm", ["i8mm", "dotprod", "generic"]),
        ("fp asimd avx2", ["generic"]),
    ],
)
def test_an_arm_cpu_has_the_tiers_whose_instructions_it_names(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: Sequence[str]
) -> None:
    machine(monkeypatch, flags, "aarch64")
    assert list(available_tiers()) == expected


def test_where_the_system_refuses_amx_the_next_tier_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, f"{VNNI} amx_tile amx_int8 amx_bf16", may_use_tiles=False)
    assert available_tiers()[0] == "avx512vnni"
    assert tiers.refused_tiers() == ("amx",)
    told = "avx512vnni; the CPU has amx, and the system does not let this process use it"
    assert tiers.describe_tier() == told


def test_a_choice_keeps_the_tier_and_those_below_it_and_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, f"{VNNI} avx_vnni")
    use_tier(None)
    assert VARIABLE not in os.environ and tiers.tier() == "avx512vnni"
    os.environ["ONEDNN_MAX_CPU_ISA"] = "SSE41"
    use_tier("avxvnni")
    assert list(available_tiers()) == ["avxvnni", "avx2", "generic"]
    assert (os.environ[VARIABLE], os.environ["ATEN_CPU_CAPABILITY"]) == ("avxvnni", "avx2")
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "SSE41", "what a user has set stays"
    assert tiers.describe_tier() == "avxvnni, as set (the CPU has avx512vnni)"


@pytest.mark.parametrize("wrong", ["amx", "i8mm", "z80"])
def test_a_tier_that_the_machine_lacks_is_refused_with_those_it_has(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    machine(monkeypatch, VNNI)
    with pytest.raises(
        TierRefused, match=f"cpu is '{wrong}', which this machine does not have: choose avx512vnni, avx2, generic"
    ):
        use_tier(wrong)


def test_the_setting_has_the_names_of_all_tiers() -> None:
    assert [name for name in LOWER if name not in str(Settings.model_fields["cpu"].annotation)] == []
    assert set(OTHER_LIBRARIES) == set(LOWER)


@pytest.mark.parametrize("command", ["server --cpu=NAME", "trainer train recipe.yaml"])
def test_server_and_trainer_refuse_a_tier_before_they_do_anything_else(command: str, tmp_path: Path) -> None:
    missing = "i8mm" if "x86" in platform.machine() else "amx"
    environment = {"PYTHONPATH": str(ROOT)} | ({VARIABLE: missing} if "trainer" in command else {})
    done = subprocess.run(
        [sys.executable, "-m", *command.replace("NAME", missing).split()],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert f"cpu is '{missing}', which this machine does not have: choose " in done.stderr


def test_linux_names_its_instruction_sets_in_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for text, expected in (
        ("processor\t: 0\nflags\t\t: fpu avx2\nprocessor\t: 1\nflags\t\t: fpu\n", {"fpu", "avx2"}),
        ("processor\t: 0\nFeatures\t: fp asimddp\n", {"fp", "asimddp"}),
        ("processor\t: 0\n", set()),
    ):
        file = tmp_path / "cpuinfo"
        file.write_text(text)
        monkeypatch.setattr(tiers, "Path", lambda path, file=file: file)
        assert tiers._cpu_flags() == expected
    file.unlink()
    assert tiers._cpu_flags() == set()
