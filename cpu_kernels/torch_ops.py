"""The operations between the linears by torch: what ``Kernels`` uses where there is no native kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class TorchNorm:
    """RMS norm as x * gain * sqrt(dim) / hypot(norm of x, sqrt(eps * dim)): four operations instead of eight."""

    def __init__(self, gain: torch.Tensor, eps: float) -> None:
        dim = len(gain)
        self._gain, self._floor = gain * dim**0.5, torch.tensor((eps * dim) ** 0.5)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
        return torch.mul(x, self._gain).div_(torch.hypot(length, self._floor))

    def of_sum(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self(x.add_(other))


class TorchOps:
    """See ``Kernels`` for what each computes. All tensors are float32, on the CPU."""

    rms_norm = TorchNorm

    def __init__(self) -> None:
        self._sin: torch.Tensor | None = None
        self._cos = self._signed_sin = torch.empty(0)

    def rotary_embedding(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        half = cos.shape[-1] // 2
        if sin is not self._sin:  # the same tensor for all layers of a step
            signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._sin, self._cos, self._signed_sin = sin, cos.unsqueeze(1), signed.unsqueeze(1)
        return self._rotated(q, half), self._rotated(k, half)

    def add_(self, x: torch.Tensor, other: torch.Tensor) -> None:
        x.add_(other)

    def silu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate).mul_(up)

    def gelu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh").mul_(up)

    def _rotated(self, x: torch.Tensor, half: int) -> torch.Tensor:
        return torch.addcmul(x * self._cos, x.roll(half, -1), self._signed_sin)
