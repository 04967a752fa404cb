"""Tries the operations in C on small known cases at start: one that does not agree with torch's here is not used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from cpu_kernels.native_kernel import Launcher
from cpu_kernels.native_ops import NativeOps
from cpu_kernels.tiers import tier
from cpu_kernels.torch_ops import TorchOps

logger = logging.getLogger("quickchange.model")

_ROWS, _DIM = 3, 38
"""Two whole vectors of sixteen and a rest."""
_EPS = 1e-6
Ops = NativeOps | TorchOps


@cache
def agrees(operation: str) -> bool:
    """Whether an operation of ``NativeOps.KERNELS`` gives torch's numbers on this CPU, at this process's tier.

    A warning names it where not. A millisecond, once in a process.
    """
    case = CASES[operation]
    try:
        found, expected = case(NativeOps(Launcher())), case(TorchOps())
        if all(torch.allclose(got, want, rtol=1e-4, atol=1e-5) for got, want in zip(found, expected, strict=True)):
            return True
        largest = max(float((got - want).abs().max()) for got, want in zip(found, expected, strict=True))
        problem = f"differs from PyTorch's by {largest:.3g}"
    except (RuntimeError, OSError) as error:
        problem = f"fails ({error})"
    logger.warning(
        "the kernel in C for %s %s on a known case (instruction set %s), so PyTorch's operation is used: please report "
        "it with what 'quickchange doctor' prints",
        operation,
        problem,
        tier(),
    )
    return False


def numbers(*shape: int, phase: float = 0.0) -> torch.Tensor:
    """Known numbers of -2 to 2 that do not repeat; no random generator is touched."""
    count = int(torch.tensor(shape).prod())
    return (2 * torch.sin(torch.arange(count) * 1.7 + phase)).view(shape)


def _rms_norm(ops: Ops) -> Sequence[torch.Tensor]:
    norm, x = ops.rms_norm(numbers(_DIM, phase=1.0), _EPS), numbers(_ROWS, _DIM)
    total = x.clone()
    return norm(x), norm.of_sum(total, numbers(_ROWS, _DIM, phase=2.0)), total


def _rotary_embedding(ops: Ops) -> Sequence[torch.Tensor]:
    q, k = numbers(1, _ROWS, 2, _DIM), numbers(1, _ROWS, 1, _DIM, phase=1.0)
    angles = numbers(1, _ROWS, _DIM // 2).repeat(1, 1, 2)
    return ops.rotary_embedding(q.transpose(1, 2), k.transpose(1, 2), angles.cos(), angles.sin())


def _add(ops: Ops) -> Sequence[torch.Tensor]:
    x = numbers(_ROWS, _DIM)
    ops.add_(x, numbers(_ROWS, _DIM, phase=1.0))
    return (x,)


def _silu_and_mul(ops: Ops) -> Sequence[torch.Tensor]:
    return (ops.silu_and_mul(4 * numbers(_ROWS, _DIM), numbers(_ROWS, _DIM, phase=1.0)),)


def _gelu_and_mul(ops: Ops) -> Sequence[torch.Tensor]:
    return (ops.gelu_and_mul(4 * numbers(_ROWS, _DIM), numbers(_ROWS, _DIM, phase=1.0)),)


CASES: Mapping[str, Callable[[Ops], Sequence[torch.Tensor]]] = {
    "rms_norm": _rms_norm,
    "rotary_embedding": _rotary_embedding,
    "add_": _add,
    "silu_and_mul": _silu_and_mul,
    "gelu_and_mul": _gelu_and_mul,
}
