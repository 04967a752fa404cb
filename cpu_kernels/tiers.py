"""The tiers of C kernels, each named for an instruction set: those that this machine can run, and the one in use.

``QUICKCHANGE_CPU`` names a lower tier than the machine's highest. It is the process's one record of that choice: the
commands write their setting there (``use_tier``) before torch is loaded, and child processes inherit it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

VARIABLE = "QUICKCHANGE_CPU"
LOWER: Mapping[str, Sequence[str]] = {
    "amx": ("avx512vnni", "avx2", "generic"),
    "avx512vnni": ("avx2", "generic"),
    "avxvnni": ("avx2", "generic"),
    "avx2": ("generic",),
    "i8mm": ("dotprod", "generic"),
    "dotprod": ("generic",),
    "generic": (),
}
"""By tier the tiers whose code stands in where it has none of its own, and whose instructions it has."""
_FLAGS: Mapping[str, frozenset[str]] = {
    "amx": frozenset({"amx_tile", "amx_int8", "amx_bf16"}),
    "avx512vnni": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}),
    "avxvnni": frozenset({"avx_vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"}),
    "i8mm": frozenset({"i8mm"}),
    "dotprod": frozenset({"asimddp"}),
    "generic": frozenset(),
}
"""What ``/proc/cpuinfo`` must name for a tier, beside what its lower tiers need."""
OTHER_LIBRARIES: Mapping[str, Mapping[str, str]] = {
    "amx": {},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avxvnni": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "",
    },
    "generic": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "i8mm": {},
    "dotprod": {},
}
"""The environment variables by which the libraries under torch, and Numba, keep to a tier's instructions."""
_X86_TIERS = ("amx", "avx512vnni", "avxvnni", "avx2", "generic")
_ARM_TIERS = ("i8mm", "dotprod", "generic")
_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158


class TierRefused(ValueError):
    """A tier that this machine does not have, or no tier at all."""


@cache
def machine_tiers() -> Sequence[str]:
    """The tiers that can run on this machine, the highest first; ``generic`` is the last."""
    return tuple(tier for tier in offered_tiers() if tier != "amx" or _may_use_tiles())


@cache
def offered_tiers() -> Sequence[str]:
    """The tiers that the CPU names, also one that the system does not let a process use (AMX)."""
    flags = _cpu_flags()
    own = _ARM_TIERS if platform.machine().lower() in ("aarch64", "arm64") else _X86_TIERS
    return tuple(tier for tier in own if all(_FLAGS[name] <= flags for name in (tier, *LOWER[tier])))


def refused_tiers() -> Sequence[str]:
    """The tiers that the CPU names and the system does not let this process use."""
    return tuple(tier for tier in offered_tiers() if tier not in machine_tiers())


def describe_tier() -> str:
    """The tier in use, and why it is not a higher one where something keeps it down."""
    text = tier()
    if os.environ.get(VARIABLE):
        text += f", as set (the CPU has {machine_tiers()[0]})" if text != machine_tiers()[0] else ", as set"
    if refused_tiers():
        text += f"; the CPU has {', '.join(refused_tiers())}, and the system does not let this process use it"
    return text


@cache
def available_tiers() -> Sequence[str]:
    """The tiers that this process may use, the highest first: the machine's, or the chosen one and those below it.

    Raises ``TierRefused``.
    """
    tiers, chosen = machine_tiers(), os.environ.get(VARIABLE)
    if not chosen:
        return tiers
    if chosen not in tiers:
        raise TierRefused(f"cpu is {chosen!r}, which this machine does not have: choose {', '.join(tiers)}")
    return tuple(name for name in tiers if name in (chosen, *LOWER[chosen]))


def tier() -> str:
    """The tier of this process: the highest that it may use."""
    return available_tiers()[0]


def use_tier(chosen: str | None) -> None:
    """Keep this process and its children to a tier, torch's own kernels too; None leaves all that the machine has.

    To be called before torch is loaded. Variables of the libraries that are set already stay. Raises ``TierRefused``.
    """
    if chosen is None:
        return
    os.environ[VARIABLE] = chosen
    available_tiers.cache_clear()
    for name, value in OTHER_LIBRARIES[tier()].items():
        os.environ.setdefault(name, value)


def _cpu_flags() -> frozenset[str]:
    """The instruction sets that CPU and system offer, by Linux's names."""
    if sys.platform == "darwin":
        is_arm = platform.machine() == "arm64"  # all of Apple's have dot products
        return frozenset({"asimddp"} | ({"i8mm"} if _has_i8mm_on_macos() else set())) if is_arm else frozenset()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass  # no /proc: nothing is known
    return frozenset()


def _has_i8mm_on_macos() -> bool:
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    name = b"hw.optional.arm.FEAT_I8MM"
    failed = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return not failed and bool(value.value)


def _may_use_tiles() -> bool:
    """Ask Linux for AMX's tiles, which a process has to do once (Linux 5.16)."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    return int(call(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0
