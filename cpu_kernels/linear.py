"""Linears with int8 weights and activations (W8A8): their interface, the native one, and torch's FBGEMM and oneDNN.

Activations are quantized row by row, with one scale a row (per-token, as in SmoothQuant, Xiao et al. 2023). Integer
sums are exact, so a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from cpu_kernels.blocks import (
    BF16_STEP,
    BLOCK_OUTPUTS,
    BY_GELU,
    BY_SILU,
    FEW_ROWS,
    HALF_BLOCK,
    NO_GATING,
    PANEL_ROWS,
    by_blocks,
    in_blocks,
    out_of_blocks,
    padded,
    sums_size,
)
from cpu_kernels.int8_weights import QMAX, Int8Rows, Outliers, pieces
from cpu_kernels.native_kernel import Launcher

if TYPE_CHECKING:
    from cpu_kernels.gemm import GemmKernel

_TINY = 1e-30
_PIECE_NUMBERS = 1 << 18
"""Activations quantized at a time: as many as the cores' caches hold while several operations pass over them."""
_fbgemm: Any = torch.ops.quantized
_onednn: Any = torch.ops.onednn
ZERO = QMAX + 1
"""The zero point of activations, as uint8; the absmax of a row is ``QMAX`` away from it."""
NO_DELTAS = (0, 0)


class Deltas(Protocol):
    """The LoRA deltas that a step's rows need from a fused linear."""

    def of(self, num_rows: int) -> tuple[int, int]:
        """The addresses of ``tasks`` and ``linears`` (``gemm.FIELDS``); ``NO_DELTAS`` where no row has an adapter."""
        ...


class GatedCall(Protocol):
    """The type of ``PackedLinear.gated``."""

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS, *, by_gelu: bool = False) -> torch.Tensor:
        """float32 [..., in] -> [..., out / 2]."""
        ...


class PackedLinear(Protocol):
    """A linear with its weight packed for one kernel.

    A call takes float32 [..., in], not empty, and returns a new float32 [..., out], bias and outliers included.
    ``deltas`` is what ``Deltas.of`` returns, ``NO_DELTAS`` unless ``can_add_deltas``.
    """

    @property
    def num_inputs(self) -> int: ...

    @property
    def num_outputs(self) -> int: ...

    def can_add_deltas(self, sizes: Sequence[int]) -> bool:
        """Whether a call can add LoRA deltas, where the weight joins linears with these numbers of outputs."""
        ...

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS) -> torch.Tensor: ...

    @property
    def gated(self) -> GatedCall | None:
        """``f(x, deltas, by_gelu=)``: silu (or gelu) of the first half of the outputs, times the second.

        float32 [..., in] -> [..., out / 2]; None where the kernel cannot. The result of more than 32 rows is in a
        workspace: it is valid until the next gated call of any linear of the same model.
        """
        ...

    def in_floats(self) -> torch.Tensor:
        """The weight it multiplies with, float32 [out, in]."""
        ...


class TorchLinear(ABC):
    """Base class of torch's linears: bias and outliers are added by operations of their own."""

    name: ClassVar[str]
    gated: ClassVar[None] = None

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        self.num_outputs, self.num_inputs = rows.integers.shape
        self._bias, self._outliers = bias, outliers

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS) -> torch.Tensor:
        assert deltas == NO_DELTAS
        if self._outliers is None:
            y = self._product(x)
        else:
            rows = x.reshape(-1, x.shape[-1])
            y = self._outliers.added_to(self._product(rows * self._outliers.inlier_mask), rows).view(*x.shape[:-1], -1)
        return y if self._bias is None else y.add_(self._bias)

    def can_add_deltas(self, sizes: Sequence[int]) -> bool:
        return False

    def in_floats(self) -> torch.Tensor:
        """The weight, float32 [out, in], read off products of unit vectors, of which nothing is rounded."""
        weight = self._product(torch.eye(self.num_inputs)).t().contiguous()
        return weight if self._outliers is None else self._outliers.put_into(weight)

    @abstractmethod
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [..., in] -> a new float32 [..., out], without bias and outlier channels."""


class FbgemmLinear(TorchLinear):
    """FBGEMM: torch's fastest but with AMX."""

    name: ClassVar[str] = "FBGEMM"

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        super().__init__(rows, bias, outliers)
        self._packed = _pack_for_fbgemm(rows)
        self._op = _fbgemm.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        absmax = x.abs().amax(-1, keepdim=True).clamp_min_(_TINY)  # [..., 1]
        return self.multiply(x / absmax).mul_(absmax)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x float32, -1 to 1."""
        product: torch.Tensor = self._op(x, 1.0 / QMAX, ZERO, self._packed)
        return product


class OnednnLinear(TorchLinear):
    """oneDNN: torch's fastest with AMX, and the fallback where torch has no FBGEMM."""

    name: ClassVar[str] = "oneDNN"

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        super().__init__(rows, bias, outliers)
        self._packed = _onednn.qlinear_prepack(rows.integers, None)
        self._op = _onednn.qlinear_pointwise.default
        self._scales = rows.scales
        self._zeros = torch.zeros(len(rows.scales), dtype=torch.int32)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= _PIECE_NUMBERS:
            integers, absmax = quantize_rows(x)
            return self.multiply(integers).mul_(absmax)
        rows = x.view(-1, x.shape[-1])
        integers = torch.empty(rows.shape, dtype=torch.uint8)
        absmax = torch.empty(len(rows), 1)
        step = max(1, _PIECE_NUMBERS // rows.shape[1])
        for first in range(0, len(rows), step):
            piece = slice(first, first + step)
            integers[piece], absmax[piece] = quantize_rows(rows[piece])
        return self.multiply(integers).mul_(absmax).view(*x.shape[:-1], -1)

    def multiply(self, integers: torch.Tensor) -> torch.Tensor:
        """Quantized x, uint8 [rows, in] -> float32 [rows, out], to be multiplied by each row's absmax."""
        product: torch.Tensor = self._op(
            integers, 1.0 / QMAX, ZERO, self._packed, self._scales, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product


class NativeLinear:
    """A weight packed in blocks (``blocks.py``), multiplied by one of the kernels of ``gemm.py``.

    Quantization, product and scaling are one kernel call: three times as fast as torch's linears at one row, and 1.5
    times in long prompts, where those need an operation for each.
    """

    def __init__(
        self,
        launch: Launcher,
        gemm: GemmKernel,
        rows: Int8Rows,
        bias: torch.Tensor | None = None,
        outliers: Outliers | None = None,
    ) -> None:
        self._launch, self._gemm = launch, gemm
        self.num_outputs, self.num_inputs = rows.integers.shape
        self._weights = in_blocks(rows.integers)
        self._width = 4 * self._weights.shape[1]
        self._row_scales = rows.scales
        self._constants = _constants(rows, bias)
        self._outliers = outliers
        weights = torch.empty(0, self.num_outputs) if outliers is None else outliers.weights
        self._outlier_weights = by_blocks(weights).transpose(0, 1).contiguous()
        self._fixed = self._addresses()

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS) -> torch.Tensor:
        y = torch.empty(*x.shape[:-1], self.num_outputs)
        return self._multiply(x, y, NO_GATING, deltas)

    @property
    def gated(self) -> GatedCall | None:
        """See ``PackedLinear``; None where the number of outputs is no multiple of a block's."""
        return self._gated if self.num_outputs % BLOCK_OUTPUTS == 0 else None

    def can_add_deltas(self, sizes: Sequence[int]) -> bool:
        """See ``PackedLinear``; inputs and outputs must fill tiles."""
        return (
            self._gemm.adds_deltas
            and self.num_inputs % BF16_STEP == 0
            and all(size % HALF_BLOCK == 0 for size in sizes)
        )

    def in_floats(self) -> torch.Tensor:
        """The weight it multiplies with, float32 [out, in]."""
        integers = out_of_blocks(self._weights, self.num_outputs, self.num_inputs)
        weight = integers * self._row_scales[:, None]
        return weight if self._outliers is None else self._outliers.put_into(weight)

    def _gated(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS, *, by_gelu: bool = False) -> torch.Tensor:
        num_units, num_rows = self.num_outputs // 2, x.numel() // self.num_inputs
        memory = self._launch.workspace("units", 4 * num_rows * num_units, reuse=num_rows > FEW_ROWS)
        y = memory.view(torch.float32).view(*x.shape[:-1], num_units)
        return self._multiply(x, y, BY_GELU if by_gelu else BY_SILU, deltas)

    def _multiply(self, x: torch.Tensor, y: torch.Tensor, gating: int, deltas: tuple[int, int]) -> torch.Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        num_rows = x.numel() // self.num_inputs
        num_padded = padded(num_rows, PANEL_ROWS)
        sums = sums_size(num_rows, self._width, len(self._weights))
        num_outliers = 0 if self._outliers is None else len(self._outliers.indices)
        num_bytes = sums + num_padded * (self._width + 4 + 4 * num_outliers)
        scratch = self._launch.workspace("scratch", num_bytes, reuse=num_rows > FEW_ROWS)
        quantized = scratch.data_ptr() + sums
        absmax = quantized + num_padded * self._width
        outlier_inputs = absmax + 4 * num_padded
        self._launch(
            self._gemm, torch.get_num_threads(), x.data_ptr(), num_rows, y.data_ptr(), gating, quantized,
            absmax, outlier_inputs, scratch.data_ptr(), *self._fixed, *deltas,
        )  # fmt: skip
        return y

    def _addresses(self) -> tuple[int, ...]:
        """The fields that are the same in every call, ``gemm.FIELDS`` from ``inputs`` to ``outlier_weights``."""
        outliers = self._outliers
        outlier_fields = (0, 0, 0, 0)
        if outliers is not None:
            mask, indices, weights = outliers.inlier_mask, outliers.indices, self._outlier_weights
            outlier_fields = (mask.data_ptr(), len(indices), indices.data_ptr(), weights.data_ptr())
        sizes = (self.num_inputs, self.num_outputs, self._width, len(self._weights))
        return *sizes, self._weights.data_ptr(), self._constants.data_ptr(), *outlier_fields


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., in] as uint8 with the zero point ``ZERO``, and each row's absmax [..., 1]."""
    absmax = x.abs().amax(-1, keepdim=True).clamp_min_(_TINY)
    # + 0.5: truncation then rounds to nearest
    return (x * (QMAX / absmax)).add_(ZERO + 0.5).to(torch.uint8), absmax


def torch_capabilities() -> Mapping[str, Any]:
    """``torch.cpu.get_capabilities`` without AVX-512 and AMX where ``ATEN_CPU_CAPABILITY`` forbids them."""
    found: Mapping[str, Any] = torch.cpu.get_capabilities()
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return {name: value for name, value in found.items() if not name.startswith(("avx512", "amx"))}
    return found


def choose_torch_linear() -> type[TorchLinear] | None:
    """The fastest int8 linear of this build of torch; None where it has none."""
    quieten_deprecations()
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(_onednn, "qlinear_pointwise")
    if has_onednn and torch_capabilities().get("amx_int8"):
        return OnednnLinear
    if "fbgemm" in torch.backends.quantized.supported_engines:
        return FbgemmLinear
    return OnednnLinear if has_onednn else None


def _pack_for_fbgemm(rows: Int8Rows) -> Any:
    integers = rows.integers
    quieten_deprecations()
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
def quieten_deprecations() -> None:
    """Trigger torch's warning that quantized tensors are deprecated, which it gives once, and drop it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def _constants(rows: Int8Rows, bias: torch.Tensor | None) -> torch.Tensor:
    """int32 [blocks, 3, 32]: initial sums, which cancel the zero point of x, and the bits of scales and bias."""
    # in pieces, as torch makes an int32 copy of what it sums
    initial = torch.cat([piece.sum(1, dtype=torch.int32) for piece in pieces(rows.integers)]) * -ZERO
    bias = torch.zeros(len(initial)) if bias is None else bias.contiguous()
    scales = rows.scales * (1.0 / QMAX)
    constants = torch.stack([initial, scales.view(torch.int32), bias.view(torch.int32)])
    return by_blocks(constants).transpose(0, 1).contiguous()
