"""Choices by the machine: device and dtype."""

from __future__ import annotations

import torch

from cpu_kernels.linear import torch_capabilities
from server.errors import SettingsError

BF16_FROM_BYTES = 256 * 1024 * 1024
"""On a CPU a smaller base stays in float32: reading its weights is no bottleneck, and float32 is exact."""


def choose_device(device: str) -> torch.device:
    """The device of a setting. Raises ``SettingsError`` if this machine has none."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available[device]:
        raise SettingsError(
            f"device is {device!r}, but this machine has none that torch {torch.__version__} can use: try 'auto'"
        )
    return torch.device(device)


def prepare(device: torch.device) -> None:
    """Configure torch before a base is loaded onto a device.

    cuDNN's attention (bfloat16 on Hopper and Blackwell) is disabled: it makes a plan for each new length, which takes
    longer than many steps, and in a server every step has new lengths. Matrix products in float32 keep full precision,
    torch's default.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def choose_dtype(dtype: str, device: torch.device, num_weight_bytes: int) -> torch.dtype:
    """The dtype of a setting; ``auto`` is bfloat16 if the device supports it and the base is large enough."""
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if _multiplies_bfloat16() and num_weight_bytes >= BF16_FROM_BYTES else torch.float32


def choose_float_dtype(dtype: str, num_unpacked_bytes: int) -> torch.dtype:
    """The dtype of unquantized parameters of an int8 base: norms, and ``num_unpacked_bytes`` of larger ones.

    ``auto`` is float32, but bfloat16 if there are many and the CPU supports it.
    """
    if dtype == "auto" and not (num_unpacked_bytes >= BF16_FROM_BYTES and _multiplies_bfloat16()):
        return torch.float32
    return choose_dtype(dtype, torch.device("cpu"), num_unpacked_bytes)


def choose_kv_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of keys and values of an int8 base: bfloat16, half the bytes, if the CPU supports it."""
    return torch.bfloat16 if _multiplies_bfloat16() else dtype


def _multiplies_bfloat16() -> bool:
    capabilities = torch_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
