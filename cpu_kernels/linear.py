"""Linears with int8 weights and activations: what they compute, and the two of torch's own, FBGEMM and oneDNN.

Every row of activations is divided by its own largest absolute value and rounded to a 127th of it; integer sums are
exact, so a row's result does not depend on its neighbours (as in SmoothQuant's per-token W8A8, Xiao et al. 2023).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Protocol

import torch

from cpu_kernels.int8_weights import QMAX, Int8Rows, Outliers

_TINY = 1e-30
_PIECE_NUMBERS = 1 << 18
"""Activations quantized at a time: as many as the cores' caches hold through several passes."""
_fbgemm: Any = torch.ops.quantized
_onednn: Any = torch.ops.onednn
ZERO = QMAX + 1
"""The integer that stands for an activation of 0; the largest of a row is ``QMAX`` away from it."""
NO_DELTAS = (0, 0)


class Deltas(Protocol):
    """What the adapters of a step's rows add to a fused linear, as its kernel is told."""

    def of(self, num_rows: int) -> tuple[int, int]:
        """The addresses of ``runs`` and ``parts`` for so many rows, ``NO_DELTAS`` where no row needs them."""
        ...


class GatedCall(Protocol):
    """``PackedLinear.gated``."""

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS, *, by_gelu: bool = False) -> torch.Tensor:
        """float32 [..., in] -> [..., out / 2]."""
        ...


class PackedLinear(Protocol):
    """A linear with its weight packed for one kernel.

    A call takes float32 [..., in], not empty, and returns a new float32 [..., out], bias and outliers included.
    ``deltas`` are what adapters add to these rows, the addresses of ``runs`` and ``parts`` (``gemm.FIELDS``): other
    than ``NO_DELTAS`` only where it can add them.
    """

    @property
    def num_inputs(self) -> int: ...

    @property
    def num_outputs(self) -> int: ...

    def can_add_deltas(self, sizes: Sequence[int]) -> bool:
        """Whether adapters' deltas can be part of its call, for linears of so many outputs one below the other."""
        ...

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS) -> torch.Tensor: ...

    @property
    def gated(self) -> GatedCall | None:
        """``f(x, deltas, by_gelu=)``: float32 [..., in] -> [..., out / 2], None where the kernel has no such call.

        silu, or gelu, of the first half of the outputs, times the second. Of more than 32 rows the result lies in a
        workspace: it is valid until the next gated call of any linear of the same model.
        """
        ...

    def in_floats(self) -> torch.Tensor:
        """The weight it multiplies with, float32 [out, in]."""
        ...


class TorchLinear:
    """What torch's linears have in common: bias and outliers come in passes of their own."""

    name: ClassVar[str]
    gated: ClassVar[None] = None

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        self.num_outputs, self.num_inputs = rows.integers.shape
        self._bias, self._outliers = bias, outliers

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS) -> torch.Tensor:
        """float32 [..., in] -> a new float32 [..., out]."""
        assert deltas == NO_DELTAS
        if self._outliers is None:
            y = self._product(x)
        else:
            rows = x.reshape(-1, x.shape[-1])
            y = self._outliers.added_to(self._product(rows * self._outliers.others), rows).view(*x.shape[:-1], -1)
        return y if self._bias is None else y.add_(self._bias)

    def can_add_deltas(self, sizes: Sequence[int]) -> bool:
        """No."""
        return False

    def in_floats(self) -> torch.Tensor:
        """The weight, float32 [out, in], read off products of unit vectors, of which nothing is rounded."""
        weight = self._product(torch.eye(self.num_inputs)).t().contiguous()
        return weight if self._outliers is None else self._outliers.put_into(weight)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class FbgemmLinear(TorchLinear):
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
        product: torch.Tensor = self._op(x, 1.0 / QMAX, ZERO, self._packed)
        return product


class OnednnLinear(TorchLinear):
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
            integers, largest = quantize_rows(x)
            return self.multiply(integers).mul_(largest)
        rows = x.view(-1, x.shape[-1])
        integers = torch.empty(rows.shape, dtype=torch.uint8)
        largest = torch.empty(len(rows), 1)
        step = max(1, _PIECE_NUMBERS // rows.shape[1])
        for first in range(0, len(rows), step):
            at = slice(first, first + step)
            integers[at], largest[at] = quantize_rows(rows[at])
        return self.multiply(integers).mul_(largest).view(*x.shape[:-1], -1)

    def multiply(self, integers: torch.Tensor) -> torch.Tensor:
        """uint8 around ``ZERO``."""
        product: torch.Tensor = self._op(
            integers, 1.0 / QMAX, ZERO, self._packed, self._scales, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., in] as uint8 around ``ZERO``, and each row's largest absolute value [..., 1]."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min_(_TINY)
    # half a step more, so that cutting off rounds to nearest
    return (x * (QMAX / largest)).add_(ZERO + 0.5).to(torch.uint8), largest


def torch_capabilities() -> Mapping[str, Any]:
    """``torch.cpu.get_capabilities`` without AVX-512 and AMX where ``ATEN_CPU_CAPABILITY`` forbids them."""
    found: Mapping[str, Any] = torch.cpu.get_capabilities()
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return {name: value for name, value in found.items() if not name.startswith(("avx512", "amx"))}
    return found


def choose_torch_linear() -> type[TorchLinear] | None:
    """The fastest of those that come with torch; None where it has none."""
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
    """torch says once that its quantized tensors will go some day; kernels pinned to this torch need them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
