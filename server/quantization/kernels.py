"""Products of activations and int8 weights: by routines of our own (``native``), else by what torch has.

Every row of activations is divided by its own largest absolute value and rounded to a 127th of it; integer sums are
exact, so a row's result does not depend on its neighbours (as in SmoothQuant's per-token W8A8, Xiao et al. 2023).
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any, ClassVar, Protocol

import torch

from cpu_kernels.capabilities import torch_capabilities
from server.quantization.native import native_kernels
from server.quantization.outliers import Outliers
from server.quantization.rows import LEVELS, Int8Rows

logger = logging.getLogger("quickchange.model")

_TINY = 1e-30
_PIECE_NUMBERS = 1 << 18
"""Activations put on the grid at a time: as many as the cores' caches hold through several passes."""
_fbgemm: Any = torch.ops.quantized
_onednn: Any = torch.ops.onednn


class Kernel(Protocol):
    """A packed weight, with a bias [out] and with columns that are multiplied in floats, where it has any."""

    name: ClassVar[str]

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., in], not empty -> a new float32 [..., out]."""
        ...

    def in_floats(self) -> torch.Tensor:
        """The weight it multiplies with, float32 [out, in]."""
        ...


ZERO = LEVELS + 1
"""The integer that stands for an activation of 0; the largest of a row is ``LEVELS`` away from it."""
HALF_LEVELS = 64
"""Of weights where pairs of products are added in 16 bits (AVX2, and AVX-512 without VNNI): 2 * 255 * 64 fits in.

Fewer levels of activations instead would fit as well, and lose more: their largest are further from the rest.
"""


class TorchKernel:
    """What torch's kernels have in common: bias and outliers come in passes of their own."""

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        self._num_inputs = rows.integers.shape[1]
        self._bias, self._outliers = bias, outliers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., in] -> a new float32 [..., out]."""
        if self._outliers is None:
            y = self._product(x)
        else:
            rows = x.reshape(-1, x.shape[-1])
            y = self._outliers.added_to(self._product(rows * self._outliers.others), rows).view(*x.shape[:-1], -1)
        return y if self._bias is None else y.add_(self._bias)

    def in_floats(self) -> torch.Tensor:
        """The weight, float32 [out, in], read off products of unit vectors, of which nothing is rounded."""
        weight = self._product(torch.eye(self._num_inputs)).t().contiguous()
        return weight if self._outliers is None else self._outliers.put_into(weight)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class FbgemmKernel(TorchKernel):
    """FBGEMM: torch's fastest but with AMX."""

    name: ClassVar[str] = "FBGEMM"

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        super().__init__(rows, bias, outliers)
        self._packed = _pack_for_fbgemm(rows)
        self._op = _fbgemm.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_min_(_TINY)  # [..., 1]
        return self.multiply(x / largest).mul_(largest)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x float32, -1 to 1."""
        product: torch.Tensor = self._op(x, 1.0 / LEVELS, ZERO, self._packed)
        return product


class OnednnKernel(TorchKernel):
    """oneDNN: torch's fastest with AMX, and the one that is left where torch has no FBGEMM."""

    name: ClassVar[str] = "oneDNN"

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        super().__init__(rows, bias, outliers)
        self._packed = _onednn.qlinear_prepack(rows.integers, None)
        self._op = _onednn.qlinear_pointwise.default
        self._scales = rows.scales
        self._zeros = torch.zeros(len(rows.scales), dtype=torch.int32)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= _PIECE_NUMBERS:
            integers, largest = _on_grid(x)
            return self.multiply(integers).mul_(largest)
        rows = x.view(-1, x.shape[-1])
        integers = torch.empty(rows.shape, dtype=torch.uint8)
        largest = torch.empty(len(rows), 1)
        step = max(1, _PIECE_NUMBERS // rows.shape[1])
        for first in range(0, len(rows), step):
            at = slice(first, first + step)
            integers[at], largest[at] = _on_grid(rows[at])
        return self.multiply(integers).mul_(largest).view(*x.shape[:-1], -1)

    def multiply(self, integers: torch.Tensor) -> torch.Tensor:
        """uint8 around ``ZERO``."""
        product: torch.Tensor = self._op(
            integers, 1.0 / LEVELS, ZERO, self._packed, self._scales, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product


def _on_grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., in] as uint8, and each row's largest absolute value [..., 1]."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min_(_TINY)
    # half a step more, so that cutting off rounds to nearest
    return (x * (LEVELS / largest)).add_(ZERO + 0.5).to(torch.uint8), largest


def choose_kernel() -> type[Kernel] | None:
    """What multiplies integers fastest on this machine; None where nothing does.

    A routine is compiled and tried. Where that fails the next one stands in, and the log says why.
    """
    native = (kernel for kernel in native_kernels().values() if _can_multiply(kernel))
    return next(native, None) or choose_torch_kernel()


def _can_multiply(kernel: type[Kernel]) -> bool:
    try:
        weight_levels(kernel)
    except Exception as error:
        logger.warning(
            "products by %s could not be compiled (%s: %s): another kernel takes their place",
            kernel.name,
            type(error).__name__,
            str(error)[:300],
            exc_info=True,
        )
        return False
    return True


def choose_torch_kernel() -> type[FbgemmKernel | OnednnKernel] | None:
    """The fastest of those that come with torch; None where it has none."""
    _quieten_deprecations()
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(_onednn, "qlinear_pointwise")
    if has_onednn and torch_capabilities().get("amx_int8"):
        return OnednnKernel
    if "fbgemm" in torch.backends.quantized.supported_engines:
        return FbgemmKernel
    return OnednnKernel if has_onednn else None


@cache
def weight_levels(kernel: type[Kernel]) -> int:
    """How far from 0 a kernel's weights may be: ``LEVELS`` where sums over the largest come out exact (it is tried)."""
    _quieten_deprecations()
    num_inputs = 256
    largest = Int8Rows(torch.full((8, num_inputs), LEVELS, dtype=torch.int8), torch.full((8,), 1.0 / LEVELS))
    sums = kernel(largest)(torch.ones(1, num_inputs))
    return LEVELS if torch.allclose(sums, torch.tensor(float(num_inputs))) else HALF_LEVELS


def _pack_for_fbgemm(rows: Int8Rows) -> Any:
    integers = rows.integers
    _quieten_deprecations()
    quantized = torch._empty_per_channel_affine_quantized(
        integers.shape,
        scales=rows.scales.double(),
        zero_points=torch.zeros(len(integers), dtype=torch.long),
        axis=0,
        dtype=torch.qint8,
    )
    quantized.set_(integers.untyped_storage(), 0, integers.shape, integers.stride())  # no copy
    engine = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "fbgemm"
        return _fbgemm.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine


@cache
def _quieten_deprecations() -> None:
    """torch says once that its quantized tensors will go some day; kernels pinned to this torch need them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
