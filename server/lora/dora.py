"""DoRA's norm of a changed weight (Liu et al. 2024), which PEFT computes at every step and we once."""

from __future__ import annotations

import torch

_CHUNK_NUMBERS = 1 << 22


def weight_norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, in_out: bool) -> torch.Tensor:
    """The norm of each output's column of ``W + a @ b`` [out], in float32 and in chunks, without the whole product.

    ``weight`` is [out, in], or [in, out] with ``in_out``; a [in, rank], b [rank, out] with the scaling.
    """
    if not in_out:
        rows = _chunks(weight, b.t())
        return torch.cat([torch.linalg.vector_norm(w.float() + part @ a.t(), dim=1) for w, part in rows])
    squares = torch.zeros(weight.shape[1], device=weight.device)
    for w, part in _chunks(weight, a):
        squares += (w.float() + part @ b).square().sum(0)
    return squares.sqrt()


def _chunks(weight: torch.Tensor, factor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of both, a few million numbers of the weight at a time."""
    size = max(1, _CHUNK_NUMBERS // weight.shape[1])
    return list(zip(weight.split(size), factor.split(size), strict=True))
