"""All routines of a server, compiled before the first request comes."""

from __future__ import annotations

import torch

from cpu_kernels.attention import row_attention
from cpu_kernels.low_rank import add_deltas
from cpu_kernels.passes import passes
from cpu_kernels.tape import player


def compile_every_routine(kv_dtype: torch.dtype) -> None:
    """Those that a base with keys and values of this format needs, but for products, which are needed to load it."""
    attention = row_attention(kv_dtype)
    attending = [] if attention is None else [attention.routine]
    if attention is not None and attention.chunks is not None:
        attending.append(attention.chunks.routine)
    for routine in (add_deltas(), player(), *passes().routines, *attending):
        routine.compile()
