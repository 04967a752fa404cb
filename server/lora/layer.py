"""A linear layer whose rows may each get another adapter's delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from server.lora.weights import LoRADelta

Run = tuple[int, int, str]
"""Rows ``start`` to ``end`` of a batch that all use the adapter of this digest."""


class LoRALinear(nn.Module):
    """Wraps a linear of the base, which stays as it is: ``base(x) + x @ a @ b`` on the rows of each adapter.

    ``runs(num_rows)`` says which rows those are; rows in no run get the base's result untouched.
    """

    def __init__(self, base: nn.Module, runs: Callable[[int], Sequence[Run]]) -> None:
        super().__init__()
        self.base = base
        self.deltas: dict[str, LoRADelta] = {}
        self._runs = runs

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for modelling code that looks at it."""
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., rows, in] -> [..., rows, out]; dimensions before the rows are of size 1."""
        y: torch.Tensor = self.base(x)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for start, end, digest in self._runs(len(flat_x)):
            delta = self.deltas.get(digest)
            if delta is None:
                continue
            # [end - start, rank], in float32 whatever the base's format
            low = flat_x[start:end].float() @ delta.a
            if flat_y.dtype == torch.float32:
                flat_y[start:end].addmm_(low, delta.b)
            else:
                flat_y[start:end] += (low @ delta.b).to(flat_y.dtype)
        return y
