"""An embedding whose rows are 8-bit integers."""

from __future__ import annotations

import torch
from torch import nn

from cpu_kernels.int8_weights import Int8Rows
from server.quantization.linear import WeightDigest, with_weight, without_weight


class Int8Embedding(nn.Module):
    """Stands in the place of an embedding; rows come out as ``dtype``, times the stock module's ``embed_scale``."""

    def __init__(self, stock: nn.Embedding, original: WeightDigest, rows: Int8Rows, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = stock.num_embeddings, stock.embedding_dim
        self.embed_scale = float(getattr(stock, "embed_scale", 1.0))
        self.original = original
        self._rows, self._dtype = rows, dtype
        self._scales = rows.scales * self.embed_scale
        self._stock = (without_weight(stock),)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., dim]."""
        return (self._rows.integers[ids] * self._scales[ids][..., None]).to(self._dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The weight these integers stand for, float32 [tokens, dim]."""
        return self._rows.in_floats()

    def in_floats(self) -> nn.Module:
        """The stock module with these numbers."""
        return with_weight(self._stock[0], self.weight)
