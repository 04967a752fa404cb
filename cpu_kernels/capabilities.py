"""What torch's own kernels may use of this CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def torch_capabilities() -> Mapping[str, Any]:
    """``torch.cpu.get_capabilities`` without AVX-512 and AMX where ``ATEN_CPU_CAPABILITY`` forbids them."""
    found: Mapping[str, Any] = torch.cpu.get_capabilities()
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return {name: value for name, value in found.items() if not name.startswith(("avx512", "amx"))}
    return found
