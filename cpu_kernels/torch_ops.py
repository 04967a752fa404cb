"""The operations between the linears by torch, for where a native kernel is missing: what ``Kernels`` falls back to."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class TorchOps:
    """See ``Kernels`` for what each computes. All tensors are float32, on the CPU."""

    def __init__(self) -> None:
        self._zero = torch.zeros(())
        self._floors: dict[tuple[float, int], torch.Tensor] = {}
        self._sin: torch.Tensor | None = None
        self._cos = self._signed_sin = self._zero

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        """x * gain * sqrt(dim) / hypot(norm of x, sqrt(eps * dim)): four operations, where modelling code has eight."""
        dim = x.shape[-1]
        floor = self._floors.get((eps, dim))
        if floor is None:
            floor = self._floors[eps, dim] = torch.tensor((eps * dim) ** 0.5)
        length = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
        return torch.addcdiv(self._zero, torch.mul(x, gain), torch.hypot(length, floor), value=dim**0.5)

    def rms_norm_of_sum(self, x: torch.Tensor, other: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        return self.rms_norm(x.add_(other), gain, eps)

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
