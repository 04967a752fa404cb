"""Native operations between the linears, each one pass over its rows: RMS norm, rotary embedding, gated units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numba import njit

from cpu_kernels.gating import gelu_vectors, silu_vectors
from cpu_kernels.intrinsics import bits_of, float_of, floats, num_threads, scratch, thread_number
from cpu_kernels.native_kernel import Launcher, NativeKernel

_SINGLE_THREAD_NUMBERS = 1 << 14
"""Up to so many numbers, one thread is faster than a team."""
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST, _LARGEST = np.float32(-88.0), np.float32(89.0)
"""Arguments beyond these give 0 and infinity: exponents with all bits clear, and all set."""
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(n)) for n in (2, 3, 4, 5, 6))
_QUIET_NAN, _INFINITY = np.int32(0x7FC0), np.int32(0x7F800000)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_rest_memory = scratch(128)


@njit(error_model="numpy", fastmath={"contract"})  # explicit: the default is the flags of the first caller
def exponential(x: Any) -> Any:
    """e to the x in float32, to three units in the last place; LLVM vectorizes it in loops.

    0 below -87.6, infinity above 88.3. Range reduction by ln 2 in two parts, then the Taylor polynomial of degree 6.
    """
    x = min(max(x, _SMALLEST), _LARGEST)
    n = np.floor(x * _LOG2E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    power = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    return power * float_of((np.int32(n) + 127) << 23)


@njit(error_model="numpy")
def to_bfloat16(number: Any) -> Any:
    """Round to nearest, ties to even; the upper 16 bits of the float32."""
    bits = bits_of(number)
    if (bits & 0x7FFFFFFF) > _INFINITY:
        return _QUIET_NAN
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def _add(a: Any) -> None:
    thread, team_size = thread_number(), num_threads()
    x, other, y = floats(a.x), floats(a.other), floats(a.y)
    for i in range(a.size * thread // team_size, a.size * (thread + 1) // team_size):
        y[i] = x[i] + other[i]


def _add_to(a: Any) -> None:
    """x += other; apart from ``_add``, which LLVM does not vectorize where y is x."""
    thread, team_size = thread_number(), num_threads()
    x, other = floats(a.x), floats(a.other)
    for i in range(a.size * thread // team_size, a.size * (thread + 1) // team_size):
        x[i] += other[i]


def _scale(a: Any) -> None:
    thread, team_size = thread_number(), num_threads()
    x, y, factor = floats(a.x), floats(a.y), np.float32(a.factor)
    for i in range(a.size * thread // team_size, a.size * (thread + 1) // team_size):
        y[i] = x[i] * factor


@njit(error_model="numpy")  # without reorder, which would turn each product into a division
def _scale_by(x: Any, gain: Any, factor: Any, y: Any, size: int) -> None:
    for i in range(size):
        y[i] = x[i] * factor * gain[i]


def _rms_norm(a: Any) -> None:
    """y = x * gain / sqrt(mean(x**2) + eps), x strided [rows, heads, dim], y contiguous.

    With ``other`` (contiguous; address 0: none) first x += other: one kernel, so that both give the same bits.
    """
    thread, team_size = thread_number(), num_threads()
    gain, eps = floats(a.gain), np.float32(a.eps)
    for row in range(a.rows * thread // team_size, a.rows * (thread + 1) // team_size):
        for head in range(a.heads):
            x = floats(a.x + 4 * (row * a.row_stride + head * a.head_stride))
            y = floats(a.y + 4 * (row * a.heads + head) * a.dim)
            if a.other:
                other = floats(a.other + 4 * (row * a.heads + head) * a.dim)
                for i in range(a.dim):
                    x[i] += other[i]
            squares = np.float32(0.0)
            for i in range(a.dim):
                squares += x[i] * x[i]
            _scale_by(x, gain, _ONE / np.sqrt(squares / np.float32(a.dim) + eps), y, a.dim)


@njit(error_model="numpy")
def _rotate(source: int, target: int, cos_at: int, sin_at: int, half: int) -> None:
    x, y, cos, sin = floats(source), floats(target), floats(cos_at), floats(sin_at)
    for i in range(half):
        y[i] = x[i] * cos[i] - x[half + i] * sin[i]
    for i in range(half, 2 * half):
        y[i] = x[i] * cos[i] + x[i - half] * sin[i]


def _rotate_heads(a: Any) -> None:
    """x * cos + rotate_half(x) * sin of queries and keys: strided [heads, rows, dim] -> [rows, heads, dim]."""
    thread, team_size = thread_number(), num_threads()
    width = 8 * a.half
    for row in range(a.rows * thread // team_size, a.rows * (thread + 1) // team_size):
        cos, sin = a.cos + row * width, a.sin + row * width
        for head in range(a.q_heads):
            source = a.q + 4 * (head * a.q_head_stride + row * a.q_row_stride)
            _rotate(source, a.q_out + (row * a.q_heads + head) * width, cos, sin, a.half)
        for head in range(a.k_heads):
            source = a.k + 4 * (head * a.k_head_stride + row * a.k_row_stride)
            _rotate(source, a.k_out + (row * a.k_heads + head) * width, cos, sin, a.half)


def _gate(vectors: Any) -> Callable[[Any], None]:
    """y = silu(gate) * up, or gelu(gate) * up, of strided rows [rows, dim]."""

    def gate(a: Any) -> None:
        thread, team_size = thread_number(), num_threads()
        rest = _rest_memory()
        whole, left = a.dim // 16, a.dim % 16
        for row in range(a.rows * thread // team_size, a.rows * (thread + 1) // team_size):
            gate, up, y = a.gate + 4 * row * a.gate_stride, a.up + 4 * row * a.up_stride, a.y + 4 * row * a.dim
            if whole:
                vectors(gate, up, y, whole)
            if left:
                for i in range(left):
                    floats(rest)[i] = floats(gate)[16 * whole + i]
                    floats(rest)[16 + i] = floats(up)[16 * whole + i]
                vectors(rest, rest + 64, rest, 1)
                for i in range(left):
                    floats(y)[16 * whole + i] = floats(rest)[i]

    return gate


_NORM = NativeKernel(_rms_norm, "x other y gain rows heads dim row_stride head_stride", "eps", reorder=True)
_ADD, _ADD_TO = NativeKernel(_add, "x other y size"), NativeKernel(_add_to, "x other size")
_SCALE = NativeKernel(_scale, "x y size", "factor")
_ROTATE = NativeKernel(
    _rotate_heads,
    "q k q_out k_out cos sin rows half q_heads q_head_stride q_row_stride k_heads k_head_stride k_row_stride",
)
_GATE_FIELDS = "gate up y rows dim gate_stride up_stride"
_SILU, _GELU = NativeKernel(_gate(silu_vectors), _GATE_FIELDS), NativeKernel(_gate(gelu_vectors), _GATE_FIELDS)


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
        self._launch(
            _NORM, _threads(numbers), x.data_ptr(), 0, y.data_ptr(), self._gain.data_ptr(), rows, heads, dim,
            row_stride, head_stride, self._eps,
        )  # fmt: skip
        return y

    def of_sum(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        dim = x.shape[-1]
        y = torch.empty(x.shape)
        self._launch(
            _NORM, _threads(x.numel()), x.data_ptr(), other.data_ptr(), y.data_ptr(), self._gain.data_ptr(),
            x.numel() // dim, 1, dim, dim, dim, self._eps,
        )  # fmt: skip
        return y


class NativeOps:
    """The native form of ``TorchOps``, by one launcher. All tensors are float32, on the CPU."""

    KERNELS: ClassVar[Mapping[str, NativeKernel]] = {
        "rms_norm": _NORM,
        "rotary_embedding": _ROTATE,
        "add_": _ADD_TO,
        "silu_and_mul": _SILU,
        "gelu_and_mul": _GELU,
    }
    """The kernel of each operation."""
    GRAPH_KERNELS: ClassVar[Sequence[NativeKernel]] = (_ADD, _SCALE)

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def rms_norm(self, gain: torch.Tensor, eps: float) -> NativeNorm:
        return NativeNorm(self._launch, gain, eps)

    def add_(self, x: torch.Tensor, other: torch.Tensor) -> None:
        self._launch(_ADD_TO, _threads(x.numel()), x.data_ptr(), other.data_ptr(), x.numel())

    def rotary_embedding(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (_, q_heads, rows, dim), k_heads = q.shape, k.shape[1]
        q_out, k_out = torch.empty(1, rows, q_heads, dim), torch.empty(1, rows, k_heads, dim)
        cos, sin = cos.contiguous(), sin.contiguous()
        self._launch(
            _ROTATE, _threads(q.numel()), q.data_ptr(), k.data_ptr(), q_out.data_ptr(), k_out.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), rows, dim // 2, q_heads, q.stride(1), q.stride(2), k_heads, k.stride(1),
            k.stride(2),
        )  # fmt: skip
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    def silu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._gate_and_mul(_SILU, gate, up)

    def gelu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._gate_and_mul(_GELU, gate, up)

    def add(self, x: torch.Tensor, other: torch.Tensor, y: torch.Tensor) -> None:
        """y = x + other, all of one shape and contiguous: replaces ``x + other`` in a layer graph."""
        self._launch(_ADD, _threads(x.numel()), x.data_ptr(), other.data_ptr(), y.data_ptr(), x.numel())

    def scale(self, x: torch.Tensor, factor: float, y: torch.Tensor) -> None:
        """y = x * factor, both of one shape and contiguous: replaces ``x * factor`` in a layer graph."""
        self._launch(_SCALE, _threads(x.numel()), x.data_ptr(), y.data_ptr(), x.numel(), factor)

    def _gate_and_mul(self, kernel: NativeKernel, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = _as_rows(gate), _as_rows(up)
        y = torch.empty(gate.shape)
        rows, dim = gate.numel() // gate.shape[-1], gate.shape[-1]
        self._launch(
            kernel, _threads(4 * gate.numel()), gate.data_ptr(), up.data_ptr(), y.data_ptr(), rows, dim,
            gate.stride(-2), up.stride(-2),
        )  # fmt: skip
        return y


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., dim] itself where its rows are contiguous and equally spaced, else a contiguous copy."""
    return x if x.stride(-1) == 1 and x.numel() == x.shape[-2] * x.shape[-1] else x.contiguous()


def _threads(numbers: int) -> int:
    return 1 if numbers <= _SINGLE_THREAD_NUMBERS else torch.get_num_threads()
