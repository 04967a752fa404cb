"""The same arithmetic in fewer operations: RMS norms, and the rotation of queries and keys.

A decoding step is hundreds of small operations between the products, each of which costs more to start than to compute.
What is replaced is found by trying it: where the stock code gives another result, it stays.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_TOLERANCE = 1e-5
_EPSILONS = ("variance_epsilon", "eps")


def quicken(model: nn.Module) -> None:
    """Replace the norms of a float32 model, and the rotation in its modelling code."""
    for name, module in list(model.named_modules()):
        if (quick := RMSNorm.like(module)) is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, quick)
    code = sys.modules[type(model).__module__]
    stock = getattr(code, "apply_rotary_pos_emb", None)
    if callable(stock) and not isinstance(stock, Rotation) and _rotates_alike(Rotation(stock)):
        code.__dict__["apply_rotary_pos_emb"] = Rotation(stock)


class RMSNorm(nn.Module):
    """``x * (weight + offset) / sqrt(mean(x**2) + eps)`` (Zhang and Sennrich 2019) over the last axis, in float32."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self._offset, self._root = offset, math.sqrt(weight.numel())
        self._floor = torch.tensor(math.sqrt(eps * weight.numel()))
        self._gain: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    @classmethod
    def like(cls, stock: nn.Module) -> RMSNorm | None:
        """One that computes what a stock module does, None where that is something else."""
        parameters = list(stock.named_parameters())
        eps = next((value for name in _EPSILONS if isinstance(value := getattr(stock, name, None), float)), None)
        if [name for name, _ in parameters] != ["weight"] or eps is None or list(stock.children()):
            return None
        weight = stock.get_parameter("weight")
        if weight.ndim != 1 or weight.dtype != torch.float32 or weight.device.type != "cpu":
            return None
        x = torch.randn(1, 3, len(weight), generator=torch.Generator().manual_seed(0))
        try:
            expected = stock(x)
        except (RuntimeError, TypeError):
            return None
        candidates = (cls(weight, eps, offset) for offset in (0.0, 1.0))
        return next((one for one in candidates if _alike(one(x), expected)), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] -> [..., dim]."""
        weight, gain = self._gain
        if weight is not (own := self._parameters["weight"]) or gain is None:
            assert own is not None
            gain = (own + self._offset) * self._root
            self._gain = own, gain
        norm = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
        return torch.mul(x, gain).div_(torch.hypot(norm, self._floor))


class Rotation:
    """``x * cos + rotate_half(x) * sin`` (Su et al. 2021) for queries and keys; other calls go to the stock code."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self._stock = stock
        self._for: torch.Tensor | None = None
        self._signed = self._cos = torch.empty(0)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        """q and k [1, heads, rows, dim], cos and sin [1, rows, dim]."""
        if others or named or not q.shape[-1] == k.shape[-1] == cos.shape[-1] or q.dtype != torch.float32:
            return self._stock(q, k, cos, sin, *others, **named)
        half = cos.shape[-1] // 2
        if sin is not self._for:
            signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._for, self._cos, self._signed = sin, cos.unsqueeze(1), signed.unsqueeze(1)
        return _rotated(q, self._cos, self._signed, half), _rotated(k, self._cos, self._signed, half)


def _rotated(x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, half: int) -> torch.Tensor:
    return torch.addcmul(x * cos, x.roll(half, -1), signed)


def _rotates_alike(quick: Rotation) -> bool:
    """Whether a rotation gives what the stock code does."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 16, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 16, generator=generator) for _ in range(2))
    try:
        expected = quick._stock(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    return all(_alike(ours, theirs) for ours, theirs in zip(quick(q, k, cos, sin), expected, strict=True))


def _alike(ours: torch.Tensor, theirs: Any) -> bool:
    return isinstance(theirs, torch.Tensor) and torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE)
