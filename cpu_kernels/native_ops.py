"""Native operations between the linears, each one pass over its rows: RMS norm, rotary embedding, gated units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from cpu_kernels.c_kernel import CKernel
from cpu_kernels.native_kernel import Launcher

_SINGLE_THREAD_NUMBERS = 1 << 14
"""Up to so many numbers, one thread is faster than a team."""
_GATE_COST = 4
"""A gated unit takes as long as so many numbers of other operations."""

_NORM = CKernel("rms_norm", "x other y gain rows heads dim row_stride head_stride", "eps")
_ROTARY = CKernel(
    "rotary", "q k q_out k_out cos sin rows half q_heads q_head_stride q_row_stride k_heads k_head_stride k_row_stride"
)
_GATE = CKernel("gate", "gate up y rows dim gate_stride up_stride by_gelu")
_ADD = CKernel("add", "x other y size")
_SCALE = CKernel("scale", "x y size", "factor")


class NativeNorm:
    """An RMS norm by one native kernel."""

    def __init__(self, launch: Launcher, gain: torch.Tensor, eps: float) -> None:
        self._launch, self._gain, self._eps = launch, gain, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y, numbers, dim = torch.empty(x.shape), x.numel(), x.shape[-1]
        rows, heads, row_stride, head_stride = numbers // dim, 1, dim, dim
        if x.ndim == 4 and x.shape[0] == 1 and x.stride(-1) == 1:
            _, rows, heads, _ = x.shape
            _, row_stride, head_stride, _ = x.stride()
        elif not x.is_contiguous():
            x = x.contiguous()
        _run(
            self._launch, _NORM, numbers, x.data_ptr(), 0, y.data_ptr(), self._gain.data_ptr(), rows, heads, dim,
            row_stride, head_stride, self._eps,
        )  # fmt: skip
        return y

    def of_sum(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        dim = x.shape[-1]
        y = torch.empty(x.shape)
        _run(
            self._launch, _NORM, x.numel(), x.data_ptr(), other.data_ptr(), y.data_ptr(), self._gain.data_ptr(),
            x.numel() // dim, 1, dim, dim, dim, self._eps,
        )  # fmt: skip
        return y


class NativeOps:
    """The native form of ``TorchOps``, by one launcher. All tensors are float32, on the CPU."""

    KERNELS: ClassVar[Mapping[str, CKernel]] = {
        "rms_norm": _NORM,
        "rotary_embedding": _ROTARY,
        "add_": _ADD,
        "silu_and_mul": _GATE,
        "gelu_and_mul": _GATE,
    }
    """The kernel of each operation."""
    GRAPH_KERNELS = (_ADD, _SCALE)

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def rms_norm(self, gain: torch.Tensor, eps: float) -> NativeNorm:
        return NativeNorm(self._launch, gain, eps)

    def add_(self, x: torch.Tensor, other: torch.Tensor) -> None:
        self.add(x, other, x)

    def rotary_embedding(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (_, q_heads, rows, dim), k_heads = q.shape, k.shape[1]
        q_out, k_out = torch.empty(1, rows, q_heads, dim), torch.empty(1, rows, k_heads, dim)
        cos, sin = cos.contiguous(), sin.contiguous()
        _run(
            self._launch, _ROTARY, q.numel() + k.numel(), q.data_ptr(), k.data_ptr(), q_out.data_ptr(),
            k_out.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, dim // 2, q_heads, q.stride(1), q.stride(2),
            k_heads, k.stride(1), k.stride(2),
        )  # fmt: skip
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    def silu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._gate_and_mul(gate, up, by_gelu=False)

    def gelu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._gate_and_mul(gate, up, by_gelu=True)

    def add(self, x: torch.Tensor, other: torch.Tensor, y: torch.Tensor) -> None:
        """y = x + other, all of one shape and contiguous: replaces ``x + other`` in a layer graph."""
        _run(self._launch, _ADD, x.numel(), x.data_ptr(), other.data_ptr(), y.data_ptr(), x.numel())

    def scale(self, x: torch.Tensor, factor: float, y: torch.Tensor) -> None:
        """y = x * factor, both of one shape and contiguous: replaces ``x * factor`` in a layer graph."""
        _run(self._launch, _SCALE, x.numel(), x.data_ptr(), y.data_ptr(), x.numel(), factor)

    def _gate_and_mul(self, gate: torch.Tensor, up: torch.Tensor, *, by_gelu: bool) -> torch.Tensor:
        gate, up = _as_rows(gate), _as_rows(up)
        y = torch.empty(gate.shape)
        rows, dim = gate.numel() // gate.shape[-1], gate.shape[-1]
        _run(
            self._launch, _GATE, _GATE_COST * gate.numel(), gate.data_ptr(), up.data_ptr(), y.data_ptr(), rows, dim,
            gate.stride(-2), up.stride(-2), by_gelu,
        )  # fmt: skip
        return y


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., dim] itself where its rows are contiguous and equally spaced, else a contiguous copy."""
    return x if x.stride(-1) == 1 and x.numel() == x.shape[-2] * x.shape[-1] else x.contiguous()


def _run(launch: Launcher, kernel: CKernel, numbers: int, *values: float) -> None:
    """Run a kernel over so many numbers on as many threads as are fastest."""
    if numbers <= _SINGLE_THREAD_NUMBERS:
        launch.alone(kernel, *values)
    else:
        launch(kernel, torch.get_num_threads(), *values)
