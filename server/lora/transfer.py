"""Copies the numbers of a step to the device: many lists in one transfer, without a wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(
    device: torch.device, *lists: Sequence[float], dtype: torch.dtype = torch.long
) -> tuple[torch.Tensor, ...]:
    """Each list as a tensor [length] on the device.

    CUDA copies pinned memory asynchronously; for other memory the host would wait for all queued work.
    """
    if device.type == "cpu" or not lists:
        return tuple(torch.tensor(numbers, dtype=dtype) for numbers in lists)
    whole = torch.tensor([number for numbers in lists for number in numbers], dtype=dtype)
    if device.type == "cuda":
        whole = whole.pin_memory()
    copied = whole.to(device, non_blocking=device.type == "cuda")
    return tuple(copied.split([len(numbers) for numbers in lists]))
